/* Rows of inputs times panels: what matrix products and attention have in common. */
#ifndef PANELS_H
#define PANELS_H

#include "vectors.h"

/* ROWS that share one reading of a panel: their sums fill the registers. COUNTS: a case for every count of them. */
#if defined(EIGHTS)
#define ROWS 6
#define COUNTS(OF) OF(1) OF(2) OF(3) OF(4) OF(5) OF(6)
#elif defined(__AVX512F__)
#define ROWS 12
#define COUNTS(OF) OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) OF(10) OF(11) OF(12)
#else
#define ROWS 2
#define COUNTS(OF) OF(1) OF(2)
#endif
#define COLUMNS (2 * LANES) /* of a panel */

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
#define WIDENED /* a bfloat16 is the upper half of a float: weights are widened on their way, inputs once */
#endif
#if defined(BF16) && defined(EIGHTS)
#define DEPTH 2
#define STEPS 2

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

/* How much room `operands` needs for so many inputs. */
INLINE int64_t operand_bytes(int64_t inputs) {
#ifdef WIDENED
    return inputs * (int64_t)sizeof(operand);
#else
    return 0 * inputs;
#endif
}

/* x [size] as operands, in `to`. */
INLINE void copy_operands(const element *x, operand *to, int64_t size) {
#ifdef WIDENED
    widen(x, to, size);
#else
    memcpy(to, x, size * sizeof *to);
#endif
}

/* x [size] as operands, in `room` where they are not the elements themselves. */
INLINE const operand *operands(const element *x, operand *room, int64_t size) {
#ifdef WIDENED
    widen(x, room, size);
    return room;
#else
    return x;
#endif
}

/* Some rows of `in` inputs, `apart` operands from one to the next, times a panel, in which it is `step` elements from
 * DEPTH inputs to the next DEPTH. soon: what is to be fetched meanwhile, `pace` elements for every DEPTH inputs. */
typedef struct {
    const operand *x;
    int64_t apart, in;
    const element *panel;
    int64_t step;
    const element *soon;
    int64_t pace;
} Rows;

/* to [rows, 2 halves of the panel] += the products. Each sum runs over the inputs in their order, whatever `rows` and
 * however the inputs are divided among calls. */
INLINE void add_rows(const Rows *from, floats (*to)[2], const int rows) {
    floats sums[ROWS][2];
    const operand *x = from->x;
    const element *panel = from->panel, *soon = from->soon;
    const int64_t in = from->in, apart = from->apart, step = from->step, pace = from->pace;
    for (int row = 0; row < rows; row++) {
        sums[row][0] = to[row][0];
        sums[row][1] = to[row][1];
    }
    for (int64_t i = 0; i < in; i += DEPTH, panel += step, soon += pace) {
        for (int64_t line = 0; line < COLUMNS * DEPTH; line += LINE)
            __builtin_prefetch(soon + line);
        for (int part = 0; part < STEPS; part++) {
            factors left = load_factors(panel, part), right = load_factors(panel + LANES * DEPTH, part);
            for (int row = 0; row < rows; row++) {
                factors value = spread(x + row * apart + i + part);
                sums[row][0] = accumulate(sums[row][0], left, value);
                sums[row][1] = accumulate(sums[row][1], right, value);
            }
        }
    }
    for (int row = 0; row < rows; row++) {
        to[row][0] = sums[row][0];
        to[row][1] = sums[row][1];
    }
}

/* `add_rows` for up to ROWS of them. */
static void add_products(const Rows *from, floats (*sums)[2], int64_t rows) {
#define OF(count) \
    case count: \
        add_rows(from, sums, count); \
        break;
    switch (rows) { COUNTS(OF) }
#undef OF
}

#endif
