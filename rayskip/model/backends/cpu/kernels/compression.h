/* Compressing weights: what compressed.h reads is written here, when a model is loaded. A reader may skip this file. */
#ifndef COMPRESSION_H
#define COMPRESSION_H

#include "compressed.h"
#include "thread_pool.h"

#define EXPONENTS (TABLE / 2)
#define NONE 255 /* in place of an exponent's number */

/* Panels of weights, each of so many lines, and their compressed parts: see Product. */
typedef struct {
    const element *panels;
    int64_t count, lines;
    uint16_t *tables;
    int64_t *odd_from;
    uint8_t *lows, *highs;
    int64_t *odd;
    element *whole;
} Compression;

#ifdef COMPRESSED
INLINE int exponent_of(element weight) { return (weight >> 7) & 255; }

/* numbers [256]: the number of each exponent that the table has. */
static void number_exponents(const uint16_t *table, uint8_t *numbers) {
    memset(numbers, NONE, 256);
    for (int number = EXPONENTS - 1; number >= 0; number--)
        numbers[exponent_of(table[number])] = (uint8_t)number;
}

INLINE bool is_odd(const element *line, const uint8_t *numbers) {
    uint8_t none = 0;
    for (int i = 0; i < 2 * HALF; i++)
        none |= numbers[exponent_of(line[i])] == NONE;
    return none;
}

/* Of the worker's panels, the table of the exponents that most weights have, and how many lines have others, to odd_from. */
static void tables_worker(void *argument, ThreadPool *pool, int worker) {
    const Compression *task = argument;
    const int64_t size = task->lines * 2 * HALF, last = chunk_begin(task->count, pool, worker + 1);
    for (int64_t panel = chunk_begin(task->count, pool, worker); panel < last; panel++) {
        const element *weights = task->panels + panel * size;
        int64_t seen[2][256] = {{0}}; /* two, so that one weight's count need not wait for the other's */
        for (int64_t i = 0; i < size; i += 2) {
            seen[0][exponent_of(weights[i])]++;
            seen[1][exponent_of(weights[i + 1])]++;
        }
        uint16_t *table = task->tables + panel * TABLE;
        for (int number = 0; number < EXPONENTS; number++) {
            int most = 0;
            for (int exponent = 1; exponent < 256; exponent++)
                if (seen[0][exponent] + seen[1][exponent] > seen[0][most] + seen[1][most])
                    most = exponent;
            table[number] = table[EXPONENTS + number] = (uint16_t)(most << 7);
            seen[0][most] = seen[1][most] = -1;
        }
        uint8_t numbers[256];
        number_exponents(table, numbers);
        task->odd_from[panel] = 0;
        for (int64_t line = 0; line < task->lines; line++)
            task->odd_from[panel] += is_odd(weights + line * 2 * HALF, numbers);
    }
}

static void compress_worker(void *argument, ThreadPool *pool, int worker) {
    const Compression *task = argument;
    const int64_t last = chunk_begin(task->count, pool, worker + 1);
    for (int64_t panel = chunk_begin(task->count, pool, worker); panel < last; panel++) {
        uint8_t numbers[256];
        number_exponents(task->tables + panel * TABLE, numbers);
        int64_t *odd = task->odd + task->odd_from[panel];
        element *whole = task->whole + (task->odd_from[panel] - panel) * 2 * HALF;
        for (int64_t line = 0; line < task->lines; line++) {
            const int64_t at = panel * task->lines + line;
            const element *from = task->panels + at * 2 * HALF;
            uint8_t *lows = task->lows + at * 2 * HALF, *highs = task->highs + at * HALF;
            for (int i = 0; i < 2 * HALF; i++)
                lows[i] = (uint8_t)((from[i] >> 8 & 128) | (from[i] & 127));
            for (int i = 0; i < HALF; i++)
                highs[i] = (uint8_t)((numbers[exponent_of(from[i])] & 15) |
                                     numbers[exponent_of(from[HALF + i])] << 4);
            if (is_odd(from, numbers)) {
                *odd++ = line * DEPTH;
                memcpy(whole, from, 2 * HALF * sizeof *from);
                whole += 2 * HALF;
            }
        }
        *odd = task->lines * DEPTH;
    }
}

/* Two steps, since the first tells how large odd and whole are: odd_from becomes where each panel's part begins in between.
 * Both return 0, or 1 when memory is out. */
int rayskip_exponent_tables(Compression *task, int64_t threads) { return parallel_for((int)threads, tables_worker, task); }
int rayskip_compress(Compression *task, int64_t threads) { return parallel_for((int)threads, compress_worker, task); }
#endif

#endif
