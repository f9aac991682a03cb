/* Matrix products of a few to some hundred rows with packed weights. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "team.h"
#include "vectors.h"

#ifdef EIGHTS
#define ROWS 6 /* that share one reading of a panel: their sums fill the registers */
#else
#define ROWS 12
#endif
#define COLUMNS (2 * LANES) /* of a panel of packed weights */
#define AHEAD 512           /* elements of a panel prefetched, where it is read once; else the next one is */

/* operand: an input as products read it. In a panel, DEPTH inputs' weights of a column lie side by side; `factors` are
 * those of LANES columns that are multiplied at once, or one row's inputs for them: all DEPTH, or in STEPS steps. */
#ifdef PAIRS
#define DEPTH 2
#define STEPS 1
typedef element operand;
typedef __m512bh factors;

INLINE floats accumulate(floats to, factors a, factors b) { return (floats)_mm512_dpbf16_ps((__m512)to, a, b); }
INLINE factors load_factors(const element *from, const int step) { return (factors)_mm512_loadu_si512(from); }

INLINE factors spread(const operand *from) {
    int32_t both;
    memcpy(&both, from, sizeof both);
    return (factors)_mm512_set1_epi32(both);
}
#else
typedef float operand;
typedef floats factors;

INLINE floats accumulate(floats to, factors a, factors b) { return multiply_add(a, b, to); }
INLINE factors spread(const operand *from) { return splat(*from); }

#ifdef BF16
#define DEPTH 2
#define STEPS 2
#define WIDENED /* a bfloat16 is the upper half of a float: weights are widened on their way, inputs once */

INLINE factors load_factors(const element *from, const int step) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)from), upper = _mm256_set1_epi32((int)0xffff0000);
    return _mm256_castsi256_ps(step ? _mm256_and_si256(both, upper) : _mm256_slli_epi32(both, 16));
}
#else
#define DEPTH 1
#define STEPS 1

INLINE factors load_factors(const element *from, const int step) { return load(from); }
#endif
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

/* How much room `operands` needs for so many inputs. */
INLINE int64_t operand_bytes(int64_t inputs) {
#ifdef WIDENED
    return inputs * (int64_t)sizeof(operand);
#else
    return 0 * inputs;
#endif
}

/* x [size] as operands, in `room` where they are not the elements themselves. size: even. */
INLINE const operand *operands(const element *x, operand *room, int64_t size) {
#ifdef WIDENED
    widen(x, room, size);
    return room;
#else
    return x;
#endif
}

/* x [rows, in] times one panel -> out [rows, width] with `stride` elements between rows. Each sum runs over the inputs
 * in their order, whatever `rows`. soon: what is to be fetched meanwhile, `pace` elements for every DEPTH inputs. */
INLINE void multiply(const operand *x, const element *panel, const element *soon, int64_t pace, const element *bias,
                     int64_t in, element *out, int64_t stride, int64_t width, const int rows) {
    floats sums[ROWS][2];
    for (int row = 0; row < rows; row++)
        sums[row][0] = sums[row][1] = splat(0);
    for (int64_t i = 0; i < in; i += DEPTH, panel += COLUMNS * DEPTH, soon += pace) {
        for (int64_t line = 0; line < COLUMNS * DEPTH; line += LINE)
            __builtin_prefetch(soon + line);
        for (int step = 0; step < STEPS; step++) {
            factors left = load_factors(panel, step), right = load_factors(panel + LANES * DEPTH, step);
            for (int row = 0; row < rows; row++) {
                factors value = spread(x + row * in + i + step);
                sums[row][0] = accumulate(sums[row][0], left, value);
                sums[row][1] = accumulate(sums[row][1], right, value);
            }
        }
    }
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
            switch (rows * (block + 1) / blocks - row) {
                OF(1) OF(2) OF(3) OF(4) OF(5) OF(6)
#if ROWS > 6
                OF(7) OF(8) OF(9) OF(10) OF(11) OF(12)
#endif
            }
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
