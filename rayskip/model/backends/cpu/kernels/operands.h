/* What products are made of on this processor. */
#ifndef OPERANDS_H
#define OPERANDS_H

#include "vectors.h"

/* ROWS that share one reading of a panel: their sums are kept in registers. COUNTS: a case for every count of them. */
#if defined(EIGHTS)
#define ROWS 6
#define COUNTS(OF) OF(1) OF(2) OF(3) OF(4) OF(5) OF(6)
#elif defined(SIXTEENS)
#define ROWS 12
#define COUNTS(OF) OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) OF(10) OF(11) OF(12)
#else
#define ROWS 2
#define COUNTS(OF) OF(1) OF(2)
#endif
#define COLUMNS (2 * LANES) /* of a panel */

/* operand: an input as products read it. In a panel, DEPTH inputs' weights of a column lie side by side; `held` are those
 * of LANES columns, and `factors` what of them is multiplied at once, all DEPTH or in STEPS steps, or one row's inputs
 * for that. */
#ifdef PAIRS
#define DEPTH 2
#define STEPS 1
typedef element operand;
typedef __m512bh factors;

INLINE floats accumulate(floats to, factors a, factors b) { return (floats)_mm512_dpbf16_ps((__m512)to, a, b); }
typedef __m512i held;
INLINE held load_held(const element *from) { return _mm512_loadu_si512(from); }
INLINE factors factors_of(held both, const int step) { return (factors)both; }

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

typedef __m256i held;
INLINE held load_held(const element *from) { return _mm256_loadu_si256((const __m256i *)from); }

INLINE factors factors_of(held both, const int step) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    return _mm256_castsi256_ps(step ? _mm256_and_si256(both, upper) : _mm256_slli_epi32(both, 16));
}
#else
#define DEPTH 1
#define STEPS 1

typedef floats held;
INLINE held load_held(const element *from) { return load(from); }
INLINE factors factors_of(held both, const int step) { return both; }
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

/* x [rows, in], `apart` elements from one to the next, as operands, in `room` where they are not the elements themselves;
 * `apart` becomes theirs. */
INLINE const operand *operands(const element *x, int64_t *apart, operand *room, int64_t rows, int64_t in) {
#ifdef WIDENED
    for (int64_t row = 0; row < rows; row++)
        copy_operands(x + row * *apart, room + row * in, in);
    *apart = in;
    return room;
#else
    return x;
#endif
}

#endif
