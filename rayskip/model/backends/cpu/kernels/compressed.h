/* Compressed weights: bfloat16 in twelve bits instead of sixteen, without loss. @GAIN@
 *
 * A reader may skip this file: results are the same bits without it, and with COMPRESSED_ROWS 0 (product.h) nothing uses
 * it.
 *
 * Nearly all weights of a panel have one of sixteen exponents, whose number takes four bits; sign and mantissa take eight.
 * That exponents hold few bits is DFloat11's observation (arXiv 2504.11651). compression.h compresses. */
#ifndef COMPRESSED_H
#define COMPRESSED_H

#include "operands.h"

/* One panel. A line is its weights of DEPTH inputs, in two halves of LANES columns.
 *
 * lows [in / DEPTH, 2, LANES * DEPTH]: signs and mantissas. highs [in / DEPTH, LANES * DEPTH]: numbers of exponents, those
 * of the first half in the lower four bits. table: the exponent of each number, shifted to its place in a bfloat16; twice.
 * odd: the lines with any other exponent, by their first input, ascending, then one past the last input. whole: those
 * lines, not compressed. */
typedef struct {
    const uint8_t *lows, *highs;
    const uint16_t *table;
    const int64_t *odd;
    const element *whole;
} Compressed;

#define HALF (LANES * DEPTH) /* weights of a line's half */
#define TABLE 32             /* entries: sixteen exponents, twice */
#define LINES_AHEAD 12       /* how far ahead of the line that is read to prefetch */

typedef struct {
    weight_vector left, right;
} Line;

#if defined(PAIRS)
#define COMPRESSED
typedef __m512i ExponentTable;
INLINE ExponentTable load_table(const uint16_t *from) { return _mm512_loadu_si512(from); }

INLINE weight_vector join(const uint8_t *lows, __m512i numbers, ExponentTable table) {
    const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)lows));
    const __m512i both = _mm512_or_si512(low, _mm512_slli_epi16(low, 8));
    return _mm512_ternarylogic_epi32(both, _mm512_set1_epi16((short)0x807f), _mm512_permutexvar_epi16(numbers, table),
                                     0xea); /* both & mask | exponent */
}

INLINE Line decompress(const uint8_t *lows, const uint8_t *highs, ExponentTable table) {
    const __m512i numbers = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)highs));
    return (Line){join(lows, numbers, table), join(lows + HALF, _mm512_srli_epi16(numbers, 4), table)};
}
#elif defined(BF16) && defined(EIGHTS)
#define COMPRESSED
typedef __m128i ExponentTable;
INLINE ExponentTable load_table(const uint16_t *from) {
    const __m256i wide = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)from), 7);
    return _mm_packus_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

INLINE weight_vector join(const uint8_t *lows, __m128i numbers, ExponentTable table) {
    const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)lows));
    const __m256i exponent = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_shuffle_epi8(table, numbers)), 7);
    const __m256i both = _mm256_or_si256(low, _mm256_slli_epi16(low, 8));
    return _mm256_or_si256(_mm256_and_si256(both, _mm256_set1_epi16((short)0x807f)), exponent);
}

INLINE Line decompress(const uint8_t *lows, const uint8_t *highs, ExponentTable table) {
    const __m128i numbers = _mm_loadu_si128((const __m128i *)highs), four = _mm_set1_epi8(15);
    return (Line){join(lows, _mm_and_si128(numbers, four), table),
                  join(lows + HALF, _mm_and_si128(_mm_srli_epi16(numbers, 4), four), table)};
}
#else
typedef int ExponentTable; /* weights are not compressed here: never called */
INLINE ExponentTable load_table(const uint16_t *from) { return 0; }
INLINE Line decompress(const uint8_t *lows, const uint8_t *highs, ExponentTable table) { return (Line){0}; }
#endif

/* Decompress the next line, whose first input is `input`. */
INLINE Line next_line(Compressed *from, ExponentTable table, int64_t input) {
    __builtin_prefetch(from->lows + LINES_AHEAD * 2 * HALF);
    __builtin_prefetch(from->highs + LINES_AHEAD * HALF);
    Line line = decompress(from->lows, from->highs, table);
    from->lows += 2 * HALF;
    from->highs += HALF;
    if (__builtin_expect(input == *from->odd, 0)) {
        line = (Line){load_weights(from->whole), load_weights(from->whole + HALF)};
        from->whole += 2 * HALF;
        from->odd++;
    }
    return line;
}

#endif
