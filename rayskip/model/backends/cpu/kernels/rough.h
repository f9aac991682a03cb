/* Matrix products of whole numbers: weights rounded to eight bits, half as much to read, and inputs to as many as sums
 * of 32 bits hold. For drafts, which may be wrong, and for screen.h. */
#ifndef ROUGH_H
#define ROUGH_H

#include "product.h"

#define TINY 1e-30f /* less is nothing, in a row of inputs or a column of weights */
#define LIMIT 1e15f /* sums of products of less are finite */

/* ROUGH_ROWS: that share one reading of a panel. ROUGH_DEPTH: inputs whose weights of a column lie side by side.
 * ROUGH_STEP: inputs that are read at once. */
#ifdef TILES
#define ROUGH_ROWS TILE_ROWS
#define ROUGH_DEPTH 4
#define ROUGH_STEP (TILE_LINES * ROUGH_DEPTH)
#else
#define ROUGH_ROWS 5
#define ROUGH_DEPTH 2
#define ROUGH_STEP 2
#endif

/* Inputs, with zeros behind them to whole steps. */
int64_t rayskip_rough_width(int64_t in) { return (in + ROUGH_STEP - 1) / ROUGH_STEP * ROUGH_STEP; }

/* panels [out / COLUMNS, rough_width / ROUGH_DEPTH, COLUMNS, ROUGH_DEPTH], filled up to whole panels with the last column
 * again. Of each column: scales: what a weight of 1 stands for; lengths: of its weights as rounded, and residues: of what
 * rounding took from them, a little more than both, which makes up for what sums of floats are off. in: even. */
typedef struct {
    const int8_t *panels;
    const float *scales, *lengths, *residues;
    int64_t out, in;
} Rough;

/* weight [out, in] -> all of `Rough`. A column's largest weight becomes 127. */
void rayskip_pack_rough(const element *weight, int8_t *panels, float *scales, float *lengths, float *residues,
                        int64_t out, int64_t in) {
    const int64_t width = rayskip_rough_width(in);
    for (int64_t column = 0; column < (out + COLUMNS - 1) / COLUMNS * COLUMNS; column++) {
        const element *own = weight + (column < out ? column : out - 1) * in;
        int8_t *to = panels + column / COLUMNS * COLUMNS * width + column % COLUMNS * ROUGH_DEPTH;
        float most = 0;
        for (int64_t i = 0; i < in; i++)
            most = fmaxf(most, fabsf(load_one(own[i])));
        const float scale = most < TINY ? 0 : most / 127;
        double length = 0, residue = 0;
        for (int64_t i = 0; i < in; i++) {
            const float one = load_one(own[i]), whole = scale > 0 ? rintf(one / scale) : 0;
            const double left = (double)one - (double)whole * scale;
            to[i / ROUGH_DEPTH * COLUMNS * ROUGH_DEPTH + i % ROUGH_DEPTH] = (int8_t)whole;
            length += (double)whole * scale * whole * scale;
            residue += left * left;
        }
        for (int64_t i = in; i < width; i++)
            to[i / ROUGH_DEPTH * COLUMNS * ROUGH_DEPTH + i % ROUGH_DEPTH] = 0;
        /* a sum of `in` products, each rounded to 24 bits and added with an error of as much, is off by less */
        const double slack = (double)(in + 16) / (1 << 23);
        scales[column] = scale;
        lengths[column] = (float)(sqrt(length) * (1 + 1e-6));
        residues[column] = (float)((sqrt(residue) + slack * (sqrt(length) + sqrt(residue))) * (1 + 1e-6)) + TINY;
    }
}

/* A row of inputs: scale: what a 1 stands for; length: of the inputs, and residue: of what rounding took from them, both
 * as in `Rough`. */
typedef struct {
    float scale, length, residue;
} RoughRow;

/* A whole number of a row; for tiles as two bytes, the upper ones of all before the lower ones. */
INLINE void put_whole(int16_t *row, int64_t width, int64_t i, int32_t whole) {
#ifdef TILES
    ((int8_t *)row)[i] = (int8_t)(whole >> 8);
    ((uint8_t *)row)[width + i] = (uint8_t)whole;
#else
    row[i] = (int16_t)whole;
#endif
}

/* x [rows, in] as whole numbers, [rows, rough_width]. A row that is not finite, or so long that sums may not be, has a
 * scale and a length of NaN. */
static void round_rows(const element *x, int16_t *to, RoughRow *each, int64_t rows, int64_t in) {
    const int64_t width = rayskip_rough_width(in);
    const int64_t finest = INT32_MAX / (127 * in) < INT16_MAX ? INT32_MAX / (127 * in) : INT16_MAX;
    for (int64_t row = 0; row < rows; row++, x += in, to += width) {
        float most = 0;
        bool broken = false;
        for (int64_t i = 0; i < in; i++) {
            const float one = fabsf(load_one(x[i]));
            broken |= !(one < LIMIT);
            most = one > most ? one : most;
        }
        const float scale = most < TINY ? 0 : most / finest, turned = scale > 0 ? 1 / scale : 0;
        double length = 0, residue = 0;
        for (int64_t i = 0; i < in; i++) {
            const float one = load_one(x[i]), whole = broken ? 0 : rintf(one * turned);
            const double left = (double)one - (double)whole * scale;
            put_whole(to, width, i, (int32_t)whole);
            length += (double)one * one;
            residue += left * left;
        }
        for (int64_t i = in; i < width; i++)
            put_whole(to, width, i, 0);
        each[row] = (RoughRow){broken ? NAN : scale, broken ? NAN : (float)(sqrt(length) * (1 + 1e-6)),
                               (float)(sqrt(residue) * (1 + 1e-6)) + TINY};
    }
}

#ifdef TILES
/* x [rows, rough_width] times one panel -> sums [rows, 2 halves of the panel]. */
INLINE void multiply_rough(const int16_t *x, const int8_t *panel, int64_t width, ints sums[ROUGH_ROWS][2], int rows) {
    ints lower[ROUGH_ROWS][2];
    tile_bytes((const int8_t *)x, (const uint8_t *)x + width, 2 * width, panel, width, sums, lower);
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++)
            sums[row][half] = (ints)(((bits)sums[row][half] << 8) + (bits)lower[row][half]); /* uppers alone may wrap */
}
#else
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));

INLINE shorts load_rough(const int8_t *from) {
#ifdef EIGHTS
    return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
#else
    return (shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
#endif
}

/* to + the products of neighbours, added up in pairs */
INLINE ints add_pairs(ints to, shorts a, shorts b) {
#ifdef EIGHTS
    return to + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return to + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}

INLINE void multiply_rough_rows(const int16_t *x, const int8_t *panel, int64_t width, ints sums[ROUGH_ROWS][2],
                                const int rows) {
    for (int row = 0; row < rows; row++)
        sums[row][0] = sums[row][1] = (ints){0};
    for (int64_t i = 0; i < width; i += 2, panel += 2 * COLUMNS) {
        __builtin_prefetch(panel + 2 * AHEAD);
        const shorts left = load_rough(panel), right = load_rough(panel + COLUMNS);
        for (int row = 0; row < rows; row++) {
            int32_t both;
            memcpy(&both, x + row * width + i, sizeof both);
            const shorts value = (shorts)(both - (ints){0});
            sums[row][0] = add_pairs(sums[row][0], left, value);
            sums[row][1] = add_pairs(sums[row][1], right, value);
        }
    }
}

/* x [rows, rough_width] times one panel -> sums [rows, 2 halves of the panel]. */
INLINE void multiply_rough(const int16_t *x, const int8_t *panel, int64_t width, ints sums[ROUGH_ROWS][2], int rows) {
#define OF(count) \
    case count: \
        multiply_rough_rows(x, panel, width, sums, count); \
        break;
    switch (rows) { OF(1) OF(2) OF(3) OF(4) OF(5) }
#undef OF
}
_Static_assert(ROUGH_ROWS == 5, "a case of multiply_rough for every count of rows");
#endif

/* The outputs of one half of a panel. */
INLINE floats rough_outputs(ints sums, const float *scales, float scale) {
    floats own;
    memcpy(&own, scales, sizeof own);
    return __builtin_convertvector(sums, floats) * scale * own;
}

/* What is done with the sums of a panel and `count` rows from `row` on; some rows may come twice (see block_of). */
typedef void Take(void *to, int64_t panel, int64_t row, const ints sums[ROUGH_ROWS][2], int count);

/* A worker's part of x [rows, in] times all panels. */
INLINE void each_rough_panel(const Rough *rough, const int16_t *x, int64_t rows, Team *team, int worker, Take *take,
                             void *to) {
    const int64_t panels = (rough->out + COLUMNS - 1) / COLUMNS, width = rayskip_rough_width(rough->in);
    const int64_t blocks = (rows + ROUGH_ROWS - 1) / ROUGH_ROWS;
    begin_blocks(rows, blocks, true);
    for (int64_t panel = share(panels, team, worker); panel < share(panels, team, worker + 1); panel++) {
        const int8_t *weights = rough->panels + panel * COLUMNS * width;
        for (int64_t index = 0; index < blocks; index++) {
            const Block block = block_of(rows, blocks, index);
            ints sums[ROUGH_ROWS][2];
            multiply_rough(x + block.row * width, weights, width, sums, (int)block.rows);
            take(to, panel, block.row, sums, (int)block.rows);
        }
    }
    end_blocks();
}

typedef struct {
    const Rough *rough;
    const int16_t *x;
    const RoughRow *each;
    element *out;
    int64_t rows;
} RoughTask;

INLINE void store_rough(void *to, int64_t panel, int64_t row, const ints sums[ROUGH_ROWS][2], int count) {
    const RoughTask *task = to;
    const Rough *rough = task->rough;
    const int64_t column = panel * COLUMNS, left = rough->out - column, width = left < COLUMNS ? left : COLUMNS;
    for (int i = 0; i < count; i++) {
        element whole[COLUMNS];
        for (int half = 0; half < 2; half++)
            store(whole + half * LANES,
                  rough_outputs(sums[i][half], rough->scales + column + half * LANES, task->each[row + i].scale));
        memcpy(task->out + (row + i) * rough->out + column, whole, width * sizeof *whole);
    }
}

static void work_on_rough_product(void *argument, Team *team, int worker) {
    RoughTask *task = argument;
    each_rough_panel(task->rough, task->x, task->rows, team, worker, store_rough, task);
}

#endif
