/* Matrix products of a few to some hundred rows with packed weights. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "team.h"
#include "vectors.h"

#define COLUMNS (2 * LANES) /* of a panel of packed weights */
#define ROWS 12             /* that share one reading of a panel: their sums fill the registers */
#define AHEAD 512           /* elements of a panel prefetched */
#ifdef BF16
#define DEPTH 2 /* inputs whose weights lie side by side */
typedef __m512bh factors;

INLINE floats accumulate(floats to, factors a, factors b) { return (floats)_mm512_dpbf16_ps((__m512)to, a, b); }

INLINE factors load_factors(const element *from) { return (factors)_mm512_loadu_si512(from); }

INLINE factors spread(const element *from) {
    int32_t both;
    memcpy(&both, from, sizeof both);
    return (factors)_mm512_set1_epi32(both);
}
#else
#define DEPTH 1
typedef floats factors;

INLINE floats accumulate(floats to, factors a, factors b) { return multiply_add(a, b, to); }
INLINE factors load_factors(const element *from) { return load(from); }
INLINE factors spread(const element *from) { return splat(*from); }
#endif

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

/* x [rows, in] times one panel -> out [rows, width] with `stride` elements between rows. Each sum runs over the inputs
 * in their order, whatever `rows`. */
INLINE void multiply(const element *x, const element *panel, const element *bias, int64_t in, element *out,
                     int64_t stride, int64_t width, const int rows) {
    floats sums[ROWS][2];
    for (int row = 0; row < rows; row++)
        sums[row][0] = sums[row][1] = (floats){0};
    for (int64_t i = 0; i < in; i += DEPTH, panel += COLUMNS * DEPTH) {
        factors left = load_factors(panel), right = load_factors(panel + LANES * DEPTH);
        __builtin_prefetch(panel + AHEAD);
        __builtin_prefetch(panel + AHEAD + LANES * DEPTH);
        for (int row = 0; row < rows; row++) {
            factors value = spread(x + row * in + i);
            sums[row][0] = accumulate(sums[row][0], left, value);
            sums[row][1] = accumulate(sums[row][1], right, value);
        }
    }
    for (int row = 0; row < rows; row++, out += stride) {
        element whole[COLUMNS];
        element *to = width == COLUMNS ? out : whole;
        for (int half = 0; half < 2; half++) {
            floats total = sums[row][half];
            store(to + half * LANES, bias ? total + load(bias + half * LANES) : total);
        }
        if (to == whole)
            memcpy(out, whole, width * sizeof *out);
    }
}

/* x [rows, in] -> out [rows, out], panels [first, last) of it. */
static void multiply_panels(const Product *product, const element *x, element *out, int64_t rows, int64_t first,
                            int64_t last) {
    const int64_t in = product->in, blocks = (rows + ROWS - 1) / ROWS;
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t column = panel * COLUMNS;
        const int64_t width = product->out - column < COLUMNS ? product->out - column : COLUMNS;
        const element *weights = product->panels + column * in, *bias = product->bias ? product->bias + column : NULL;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t row = rows * block / blocks;
            const element *from = x + row * in;
            element *to = out + row * product->out + column;
#define OF(count) \
    case count: \
        multiply(from, weights, bias, in, to, product->out, width, count); \
        break;
            switch (rows * (block + 1) / blocks - row) {
                OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) OF(10) OF(11) OF(12)
            }
#undef OF
        }
    }
}

/* A worker's part of a product. */
static void multiply_share(const Product *product, const element *x, element *out, int64_t rows, Team *team,
                           int worker) {
    const int64_t panels = (product->out + COLUMNS - 1) / COLUMNS;
    multiply_panels(product, x, out, rows, share(panels, team, worker), share(panels, team, worker + 1));
}

#endif
