/* Products of up to 32 rows with a panel in tiles (AMX): of a panel's lines, sixteen at once. */
#ifndef TILES_H
#define TILES_H

#include "panels.h"

#ifdef TILES
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_ROWS 16  /* at most */
#define TILE_LINES 16 /* of a panel's half */
#define TILE_BYTES 64 /* of a row or line */
#define TILE_INPUTS (TILE_LINES * DEPTH)

/* The system keeps tiles for the threads of a process that has asked for it. Returns whether it does. */
static bool may_use_tiles(void) {
    const long request_permission = 0x1023, tile_data = 18; /* see arch_prctl */
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* What is stored before is in memory from here on, and what is stored later is not: GCC does not know that loads of tiles
 * and of their configuration read it. */
INLINE void settle_memory(void) { __asm__ volatile("" ::: "memory"); }

/* What the thread's tiles are set to, -1: to nothing. Setting them takes as long as a short product. */
static _Thread_local int set_first = -1, set_second = -1;

/* Tiles 4 and 5 hold `first` and `second` rows of inputs, 6 and 7 a panel's halves; 0 and 1 are sums of the first rows with
 * either half, 2 and 3 of the second ones. */
static void begin_tiles(int first, int second) {
    if (first == set_first && second == set_second)
        return;
    set_first = first;
    set_second = second;
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    const int rows[8] = {first, first, second, second, first, second, TILE_LINES, TILE_LINES};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = (uint8_t)rows[tile];
        config.bytes[tile] = rows[tile] ? TILE_BYTES : 0;
    }
    settle_memory();
    _tile_loadconfig(&config);
    settle_memory();
}

static void end_tiles(void) {
    _tile_release();
    set_first = set_second = -1;
}

/* Of a block's rows, those in the first tiles. */
INLINE int first_rows(int rows) { return rows <= TILE_ROWS ? rows : (rows + 1) / 2; }

INLINE void clear_sums(const bool both) {
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

INLINE void load_sums(const void *first, const void *second, const bool both) {
    _tile_loadd(0, first, 2 * TILE_BYTES);
    _tile_loadd(1, (const char *)first + TILE_BYTES, 2 * TILE_BYTES);
    if (both) {
        _tile_loadd(2, second, 2 * TILE_BYTES);
        _tile_loadd(3, (const char *)second + TILE_BYTES, 2 * TILE_BYTES);
    }
}

INLINE void store_sums(void *first, void *second, const bool both) {
    _tile_stored(0, first, 2 * TILE_BYTES);
    _tile_stored(1, (char *)first + TILE_BYTES, 2 * TILE_BYTES);
    if (both) {
        _tile_stored(2, second, 2 * TILE_BYTES);
        _tile_stored(3, (char *)second + TILE_BYTES, 2 * TILE_BYTES);
    }
}

/* Sums += rows of inputs, `apart` operands from one to the next, times lines of a panel, `step` elements from one to the
 * next. */
INLINE void add_tiles(const operand *x, int64_t apart, const element *lines, int64_t step, const int first,
                      const bool both) {
    _tile_stream_loadd(6, lines, step * sizeof *lines);
    _tile_stream_loadd(7, lines + HALF, step * sizeof *lines);
    _tile_loadd(4, x, apart * sizeof *x);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
        _tile_loadd(5, x + first * apart, apart * sizeof *x);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* `count` lines from those of `input` on, one after the other. */
INLINE void next_lines(Packed *lines, Table table, int64_t input, int64_t count, element *to) {
    for (int64_t line = 0; line < count; line++) {
        const Line one = next_line(lines, table, input + line * DEPTH);
        memcpy(to + line * 2 * HALF, &one, sizeof one);
    }
}

/* sums [rows, 2 halves of the panel] += the products, or = where they are `fresh`; as `add_rows` but for the order in which
 * inputs are added up: it is the same whatever `rows`, of which begin_tiles has been told, and however whole TILE_INPUTS are
 * divided among calls. */
INLINE void tile_rows(const Rows *from, floats (*sums)[2], const bool packed, const bool fresh, const int rows) {
    const bool both = rows > TILE_ROWS;
    const int first = first_rows(rows);
    const element *panel = from->panel, *soon = from->soon;
    const int64_t in = from->in;
    Packed lines = from->packed;
    const Table table = packed ? load_table(from->packed.table) : (Table){0};
    element own[TILE_LINES * 2 * HALF] __attribute__((aligned(64)));
    if (fresh)
        clear_sums(both);
    else {
        settle_memory();
        load_sums(sums, sums + first, both);
    }
    int64_t i = 0;
    for (; i + TILE_INPUTS <= in; i += TILE_INPUTS) {
        if (packed)
            next_lines(&lines, table, i, TILE_LINES, own);
        else {
            for (int64_t at = 0; at < from->pace * TILE_LINES; at += LINE)
                __builtin_prefetch(soon + at, 0, 2);
            soon += from->pace * TILE_LINES;
        }
        settle_memory();
        add_tiles(from->x + i, from->apart, packed ? own : panel, packed ? 2 * HALF : from->step, first, both);
        settle_memory();
        panel += from->step * TILE_LINES;
    }
    if (i < in) { /* the rest of both are zeros */
        const int64_t left = in - i, count = left / DEPTH;
        operand last[2 * TILE_ROWS * TILE_INPUTS] __attribute__((aligned(64)));
        if (packed)
            next_lines(&lines, table, i, count, own);
        else
            for (int64_t line = 0; line < count; line++)
                memcpy(own + line * 2 * HALF, panel + line * from->step, 2 * HALF * sizeof *own);
        memset(own + count * 2 * HALF, 0, (TILE_LINES - count) * 2 * HALF * sizeof *own);
        memset(last, 0, sizeof last);
        for (int row = 0; row < rows; row++)
            memcpy(last + row * TILE_INPUTS, from->x + row * from->apart + i, left * sizeof *last);
        settle_memory();
        add_tiles(last, TILE_INPUTS, own, 2 * HALF, first, both);
        settle_memory();
    }
    store_sums(sums, sums + first, both);
}

/* upper, lower [rows, 2 halves of a panel] = inputs [rows, width] of either sign and without one, `apart` bytes from a row
 * to the next, times the panel [width / 4, COLUMNS, 4]. begin_tiles was told of the rows, as first and as second ones. */
INLINE void tile_bytes(const int8_t *uppers, const uint8_t *lowers, int64_t apart, const int8_t *panel, int64_t width,
                       ints (*upper)[2], ints (*lower)[2]) {
    clear_sums(true);
    for (int64_t i = 0; i < width; i += TILE_BYTES, panel += COLUMNS * TILE_BYTES) {
        for (int64_t line = 0; line < COLUMNS * TILE_BYTES; line += 64)
            __builtin_prefetch(panel + COLUMNS * TILE_BYTES + line);
        _tile_loadd(6, panel, 2 * TILE_BYTES);
        _tile_loadd(7, panel + TILE_BYTES, 2 * TILE_BYTES);
        _tile_loadd(4, uppers + i, apart);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, lowers + i, apart);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    store_sums(upper, lower, true);
}
#endif

#endif
