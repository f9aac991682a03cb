/* The inner loop of products in AMX tiles: up to 32 rows times one panel, sixteen of its lines at once. A reader without
 * such a processor may skip this file: panels.h has the same in vectors. */
#ifndef TILES_H
#define TILES_H

#include "panels.h"

#ifdef TILES
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_ROWS 16  /* of a block, at most */
#define TILE_LINES 16 /* of a panel, in one tile */
#define TILE_BYTES 64 /* of a row or line of a tile */
#define TILE_INPUTS (TILE_LINES * DEPTH)

/* Ask the system to let this process's threads use tiles; whether it does. */
static bool may_use_tiles(void) {
    const long request_permission = 0x1023, tile_data = 18; /* see arch_prctl */
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* Keep the compiler from moving stores across: GCC does not know that loading tiles or their configuration reads memory. */
INLINE void compiler_fence(void) { __asm__ volatile("" ::: "memory"); }

/* How many rows the thread's tiles are configured for, -1: they are not. Configuring takes as long as a short product. */
static _Thread_local int configured_first = -1, configured_second = -1;

/* Configure tiles: 4 and 5 hold `first` and `second` rows of inputs, 6 and 7 a panel's halves; 0 and 1 the sums of the
 * first rows with either half, 2 and 3 those of the second rows. */
static void begin_tiles(int first, int second) {
    if (first == configured_first && second == configured_second)
        return;
    configured_first = first;
    configured_second = second;
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
    compiler_fence();
    _tile_loadconfig(&config);
    compiler_fence();
}

static void end_tiles(void) {
    _tile_release();
    configured_first = configured_second = -1;
}

/* How many of a block's rows are in the first tiles. */
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

/* Sums += rows of inputs, `stride` operands from one to the next, times lines of a panel, `panel_stride` elements from one
 * to the next. */
INLINE void add_tiles(const operand *x, int64_t stride, const element *lines, int64_t panel_stride, const int first,
                      const bool both) {
    _tile_stream_loadd(6, lines, panel_stride * sizeof *lines);
    _tile_stream_loadd(7, lines + HALF, panel_stride * sizeof *lines);
    _tile_loadd(4, x, stride * sizeof *x);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
        _tile_loadd(5, x + first * stride, stride * sizeof *x);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* to = the next `count` lines, decompressed, the first of which begins with `input`. */
INLINE void next_lines(Compressed *lines, ExponentTable table, int64_t input, int64_t count, element *to) {
    for (int64_t line = 0; line < count; line++) {
        const Line one = next_line(lines, table, input + line * DEPTH);
        memcpy(to + line * 2 * HALF, &one, sizeof one);
    }
}

/* sums [rows, 2 halves of the panel] += the products, or = if `fresh`. begin_tiles was told of `rows`. Inputs are added up
 * in another order than by `add_rows`, but always in the same one, whatever `rows` and however whole TILE_INPUTS are
 * divided among calls. */
INLINE void tile_rows(const PanelProduct *from, floats (*sums)[2], const bool compressed, const bool fresh,
                      const int rows) {
    const bool both = rows > TILE_ROWS;
    const int first = first_rows(rows);
    const element *panel = from->panel, *prefetch = from->prefetch;
    const int64_t in = from->in;
    Compressed lines = from->compressed;
    const ExponentTable table = compressed ? load_table(from->compressed.table) : (ExponentTable){0};
    element own[TILE_LINES * 2 * HALF] __attribute__((aligned(64)));
    if (fresh)
        clear_sums(both);
    else {
        compiler_fence();
        load_sums(sums, sums + first, both);
    }
    int64_t i = 0;
    for (; i + TILE_INPUTS <= in; i += TILE_INPUTS) {
        if (compressed)
            next_lines(&lines, table, i, TILE_LINES, own);
        else {
            for (int64_t at = 0; at < from->prefetch_stride * TILE_LINES; at += LINE)
                __builtin_prefetch(prefetch + at, 0, 2);
            prefetch += from->prefetch_stride * TILE_LINES;
        }
        compiler_fence();
        add_tiles(from->x + i, from->stride, compressed ? own : panel, compressed ? 2 * HALF : from->panel_stride, first,
                  both);
        compiler_fence();
        panel += from->panel_stride * TILE_LINES;
    }
    if (i < in) { /* the last, incomplete tiles: filled up with zeros */
        const int64_t left = in - i, count = left / DEPTH;
        operand last[2 * TILE_ROWS * TILE_INPUTS] __attribute__((aligned(64)));
        if (compressed)
            next_lines(&lines, table, i, count, own);
        else
            for (int64_t line = 0; line < count; line++)
                memcpy(own + line * 2 * HALF, panel + line * from->panel_stride, 2 * HALF * sizeof *own);
        memset(own + count * 2 * HALF, 0, (TILE_LINES - count) * 2 * HALF * sizeof *own);
        memset(last, 0, sizeof last);
        for (int row = 0; row < rows; row++)
            memcpy(last + row * TILE_INPUTS, from->x + row * from->stride + i, left * sizeof *last);
        compiler_fence();
        add_tiles(last, TILE_INPUTS, own, 2 * HALF, first, both);
        compiler_fence();
    }
    store_sums(sums, sums + first, both);
}

/* upper, lower [rows, 2 halves of a panel] = the upper (signed) and the lower (unsigned) bytes of inputs [rows, width],
 * `stride` bytes from one row to the next, times the panel [width / 4, COLUMNS, 4]. begin_tiles was told of the rows, as
 * first and as second ones. */
INLINE void tile_bytes(const int8_t *uppers, const uint8_t *lowers, int64_t stride, const int8_t *panel, int64_t width,
                       ints (*upper)[2], ints (*lower)[2]) {
    clear_sums(true);
    for (int64_t i = 0; i < width; i += TILE_BYTES, panel += COLUMNS * TILE_BYTES) {
        for (int64_t line = 0; line < COLUMNS * TILE_BYTES; line += 64)
            __builtin_prefetch(panel + COLUMNS * TILE_BYTES + line);
        _tile_loadd(6, panel, 2 * TILE_BYTES);
        _tile_loadd(7, panel + TILE_BYTES, 2 * TILE_BYTES);
        _tile_loadd(4, uppers + i, stride);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, lowers + i, stride);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    store_sums(upper, lower, true);
}
#endif

#endif
