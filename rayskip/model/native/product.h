/* Matrix products of a few to some hundred rows with packed weights. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "panels.h"
#include "team.h"

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

/* A product's weights: `panels` as packed, bias [out, filled up to whole panels] or NULL. */
typedef struct {
    const element *panels, *bias;
    int64_t out, in;
} Product;

/* x [rows, in] times one panel -> out [rows, width] with `stride` elements between rows. soon, pace: see Rows. */
INLINE void multiply(const operand *x, const element *panel, const element *soon, int64_t pace, const element *bias,
                     int64_t in, element *out, int64_t stride, int64_t width, const int rows) {
    floats sums[ROWS][2];
    for (int row = 0; row < rows; row++)
        sums[row][0] = sums[row][1] = splat(0);
    const Rows from = {x, in, in, panel, COLUMNS * DEPTH, soon, pace};
    add_rows(&from, sums, rows);
    for (int row = 0; row < rows; row++, out += stride) {
        element filled[COLUMNS];
        element *to = width == COLUMNS ? out : filled;
        for (int half = 0; half < 2; half++) {
            floats total = sums[row][half];
            store(to + half * LANES, bias ? total + load(bias + half * LANES) : total);
        }
        if (to == filled)
            memcpy(out, filled, width * sizeof *out);
    }
}

/* x [rows, in] -> out [rows, out], panels [first, last) of it. */
static void multiply_panels(const Product *product, const operand *x, element *out, int64_t rows, int64_t first,
                            int64_t last) {
    const int64_t in = product->in, blocks = (rows + ROWS - 1) / ROWS;
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t column = panel * COLUMNS;
        const int64_t width = product->out - column < COLUMNS ? product->out - column : COLUMNS;
        const element *weights = product->panels + column * in, *bias = product->bias ? product->bias + column : NULL;
        const int64_t size = COLUMNS * in, pace = blocks == 1 ? COLUMNS * DEPTH : COLUMNS * DEPTH / blocks;
        for (int64_t block = 0; block < blocks; block++) {
            const element *soon = blocks == 1 ? weights + AHEAD : weights + size + size * block / blocks;
            const int64_t row = rows * block / blocks;
            const operand *from = x + row * in;
            element *to = out + row * product->out + column;
#define OF(count) \
    case count: \
        multiply(from, weights, soon, pace, bias, in, to, product->out, width, count); \
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
