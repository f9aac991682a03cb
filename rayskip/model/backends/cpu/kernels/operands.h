/* What a matrix product multiplies on this processor, and how its weights lie in memory.
 *
 * Weights lie in panels of COLUMNS outputs, so that one load gives a vector of outputs' weights for one input. A product
 * keeps the sums of ROWS rows with a panel's columns in registers, and reads each weight once for all of them. */
#ifndef OPERANDS_H
#define OPERANDS_H

#include "vectors.h"

/* ROWS: as many as registers have sums for. COUNTS: a case for every count of them, so that each is unrolled. */
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
#define COLUMNS (2 * LANES) /* of a panel: two halves, a register each */

/* operand: an input as products read it. In a panel, a column's weights of DEPTH successive inputs lie side by side, since
 * instructions multiply bfloat16 in pairs. weight_vector: those of LANES columns in one register. factors: what one
 * instruction multiplies: all DEPTH of them or, in STEPS steps, one after the other. */
#ifdef PAIRS
#define DEPTH 2
#define STEPS 1
typedef element operand;
typedef __m512bh factors;

INLINE floats accumulate(floats to, factors a, factors b) { return (floats)_mm512_dpbf16_ps((__m512)to, a, b); }
typedef __m512i weight_vector;
INLINE weight_vector load_weights(const element *from) { return _mm512_loadu_si512(from); }
INLINE factors factors_of(weight_vector both, const int step) { return (factors)both; }

INLINE factors broadcast_operand(const operand *from) {
    int32_t both;
    memcpy(&both, from, sizeof both);
    return (factors)_mm512_set1_epi32(both);
}
#else
typedef float operand;
typedef floats factors;

INLINE floats accumulate(floats to, factors a, factors b) { return multiply_add(a, b, to); }
INLINE factors broadcast_operand(const operand *from) { return broadcast(*from); }

#ifdef BF16
#define WIDENED /* inputs are widened to floats once, before the product, and weights in registers within it */
#endif
#if defined(BF16) && defined(EIGHTS)
#define DEPTH 2
#define STEPS 2

typedef __m256i weight_vector;
INLINE weight_vector load_weights(const element *from) { return _mm256_loadu_si256((const __m256i *)from); }

INLINE factors factors_of(weight_vector both, const int step) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    return _mm256_castsi256_ps(step ? _mm256_and_si256(both, upper) : _mm256_slli_epi32(both, 16));
}
#else
#define DEPTH 1
#define STEPS 1

typedef floats weight_vector;
INLINE weight_vector load_weights(const element *from) { return load(from); }
INLINE factors factors_of(weight_vector both, const int step) { return both; }
#endif
#endif

/* Bytes of workspace that `operands` needs for so many inputs. */
INLINE int64_t operand_bytes(int64_t inputs) {
#ifdef WIDENED
    return inputs * (int64_t)sizeof(operand);
#else
    return 0 * inputs;
#endif
}

/* to [size] = x as operands. */
INLINE void copy_operands(const element *x, operand *to, int64_t size) {
#ifdef WIDENED
    widen(x, to, size);
#else
    memcpy(to, x, size * sizeof *to);
#endif
}

/* x [rows, in] as operands: the elements themselves, or a copy in the workspace. stride: elements from one row to the next;
 * becomes that of the operands returned. */
INLINE const operand *operands(const element *x, int64_t *stride, operand *workspace, int64_t rows, int64_t in) {
#ifdef WIDENED
    for (int64_t row = 0; row < rows; row++)
        copy_operands(x + row * *stride, workspace + row * in, in);
    *stride = in;
    return workspace;
#else
    return x;
#endif
}

#endif
