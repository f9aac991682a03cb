/* Matrix products of a few to some hundred rows with packed weights. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "panels.h"
#include "team.h"

/* FEW: rows for which unpacking weights takes less time than is saved in reading. */
#if !defined(PACKED)
#define FEW 0
#elif defined(EIGHTS)
#define FEW 3
#else
#define FEW ROWS
#endif
#define AHEAD 512 /* elements of a panel prefetched, where it is read once; else the next one is */

/* weight [out, in] -> panels [out / COLUMNS, in / DEPTH, COLUMNS, DEPTH], filled up with zeros. in: a multiple of
 * DEPTH. */
void pack(const element *weight, element *panels, int64_t out, int64_t in) {
    for (int64_t panel = 0; panel * COLUMNS < out; panel++)
        for (int64_t i = 0; i < in; i += DEPTH)
            for (int64_t column = panel * COLUMNS; column < (panel + 1) * COLUMNS; column++)
                for (int64_t j = 0; j < DEPTH; j++)
                    *panels++ = column < out ? weight[column * in + i + j] : (element)0;
}

/* A product's weights: `panels` from `pack`, bias [out, filled up to whole panels] or NULL. lows: NULL, or with what
 * follows the same weights again, all panels' parts one after the other (see Packed); odd_from: where a panel's lines
 * begin in `odd`. */
typedef struct {
    const element *panels, *bias;
    int64_t out, in;
    const uint8_t *lows, *highs;
    const uint16_t *tables;
    const int64_t *odd, *odd_from;
    const element *whole;
} Product;

INLINE Packed packed_panel(const Product *product, int64_t panel) {
    const int64_t size = panel * COLUMNS * product->in, begin = product->odd_from[panel];
    return (Packed){product->lows + size, product->highs + size / 2, product->tables + panel * TABLE, product->odd + begin,
                    product->whole + (begin - panel) * 2 * HALF};
}

/* x [rows, in] times one panel -> out [rows, out] from the panel's first column on. packed: whether its packed weights
 * are read. soon, pace: see Rows. */
INLINE void multiply(const Product *product, int64_t panel, const operand *x, const element *soon, int64_t pace,
                     element *out, const bool packed, const int rows) {
    const int64_t in = product->in, column = panel * COLUMNS, left = product->out - column;
    const element *bias = product->bias ? product->bias + column : NULL;
    floats sums[ROWS][2];
    for (int row = 0; row < rows; row++)
        sums[row][0] = sums[row][1] = splat(0);
    const Rows from = {x, in, in, product->panels + column * in, COLUMNS * DEPTH, soon, pace,
                       packed ? packed_panel(product, panel) : (Packed){0}};
    add_rows(&from, sums, packed, rows);
    for (int row = 0; row < rows; row++, out += product->out) {
        element filled[COLUMNS];
        element *to = left < COLUMNS ? filled : out;
        for (int half = 0; half < 2; half++) {
            floats total = sums[row][half];
            store(to + half * LANES, bias ? total + load(bias + half * LANES) : total);
        }
        if (to == filled)
            memcpy(out, filled, left * sizeof *out);
    }
}

/* x [rows, in] -> out [rows, out], panels [first, last) of it. */
static void multiply_panels(const Product *product, const operand *x, element *out, int64_t rows, int64_t first,
                            int64_t last) {
    const int64_t size = COLUMNS * product->in, blocks = (rows + ROWS - 1) / ROWS, pace = COLUMNS * DEPTH / blocks;
    const bool packed = rows <= FEW && product->lows;
    for (int64_t panel = first; panel < last; panel++) {
        const element *weights = product->panels + panel * size;
        for (int64_t block = 0; block < blocks; block++) {
            const element *soon = blocks == 1 ? weights + AHEAD : weights + size + size * block / blocks;
            const int64_t row = rows * block / blocks;
            const operand *from = x + row * product->in;
            element *to = out + row * product->out + panel * COLUMNS;
#define OF(count) \
    case count: \
        if (packed) \
            multiply(product, panel, from, soon, pace, to, true, count); \
        else \
            multiply(product, panel, from, soon, pace, to, false, count); \
        break;
            switch (rows * (block + 1) / blocks - row) { COUNTS(OF) }
#undef OF
        }
    }
}

/* A worker's part of a product. room: of the worker's own, for operand_bytes(rows * in). */
static void multiply_share(const Product *product, const element *x, element *out, int64_t rows, operand *room,
                           Team *team, int worker) {
    const int64_t panels = (product->out + COLUMNS - 1) / COLUMNS;
    multiply_panels(product, operands(x, room, rows * product->in), out, rows, share(panels, team, worker),
                    share(panels, team, worker + 1));
}

#endif
