/* Weights of bfloat16 in twelve bits without loss, a quarter less to read: nearly all weights of a panel have one of
 * sixteen exponents, whose number takes four bits. That exponents hold few bits is DFloat11's observation (arXiv
 * 2504.11651). */
#ifndef PACKED_H
#define PACKED_H

#include "operands.h"

/* A panel. A line is what it has of DEPTH inputs, in two halves of LANES columns. lows [in / DEPTH, 2, LANES * DEPTH]:
 * signs and mantissas; highs [in / DEPTH, LANES * DEPTH]: numbers of exponents, those of the first half in the lower four
 * bits; table: exponents where bfloat16 has them, by number, twice. odd: where lines with other exponents begin,
 * in inputs and ascending, and one past the last; whole: those lines as they are. */
typedef struct {
    const uint8_t *lows, *highs;
    const uint16_t *table;
    const int64_t *odd;
    const element *whole;
} Packed;

#define HALF (LANES * DEPTH) /* weights of a line's half */
#define TABLE 32             /* two times sixteen */
#define LINES_AHEAD 12       /* fetched before they are read */

typedef struct {
    held left, right;
} Line;

#if defined(PAIRS)
#define PACKED
typedef __m512i Table;
INLINE Table load_table(const uint16_t *from) { return _mm512_loadu_si512(from); }

INLINE held join(const uint8_t *lows, __m512i numbers, Table table) {
    const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)lows));
    const __m512i both = _mm512_or_si512(low, _mm512_slli_epi16(low, 8));
    return _mm512_ternarylogic_epi32(both, _mm512_set1_epi16((short)0x807f), _mm512_permutexvar_epi16(numbers, table),
                                     0xea); /* both & mask | exponent */
}

INLINE Line unpack(const uint8_t *lows, const uint8_t *highs, Table table) {
    const __m512i numbers = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)highs));
    return (Line){join(lows, numbers, table), join(lows + HALF, _mm512_srli_epi16(numbers, 4), table)};
}
#elif defined(BF16) && defined(EIGHTS)
#define PACKED
typedef __m128i Table;
INLINE Table load_table(const uint16_t *from) {
    const __m256i wide = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)from), 7);
    return _mm_packus_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

INLINE held join(const uint8_t *lows, __m128i numbers, Table table) {
    const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)lows));
    const __m256i exponent = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_shuffle_epi8(table, numbers)), 7);
    const __m256i both = _mm256_or_si256(low, _mm256_slli_epi16(low, 8));
    return _mm256_or_si256(_mm256_and_si256(both, _mm256_set1_epi16((short)0x807f)), exponent);
}

INLINE Line unpack(const uint8_t *lows, const uint8_t *highs, Table table) {
    const __m128i numbers = _mm_loadu_si128((const __m128i *)highs), four = _mm_set1_epi8(15);
    return (Line){join(lows, _mm_and_si128(numbers, four), table),
                  join(lows + HALF, _mm_and_si128(_mm_srli_epi16(numbers, 4), four), table)};
}
#else
typedef int Table; /* of no panel */
INLINE Table load_table(const uint16_t *from) { return 0; }
INLINE Line unpack(const uint8_t *lows, const uint8_t *highs, Table table) { return (Line){0}; }
#endif

/* The line of the inputs from `input` on, which is the next one. */
INLINE Line next_line(Packed *from, Table table, int64_t input) {
    __builtin_prefetch(from->lows + LINES_AHEAD * 2 * HALF);
    __builtin_prefetch(from->highs + LINES_AHEAD * HALF);
    Line line = unpack(from->lows, from->highs, table);
    from->lows += 2 * HALF;
    from->highs += HALF;
    if (__builtin_expect(input == *from->odd, 0)) {
        line = (Line){load_held(from->whole), load_held(from->whole + HALF)};
        from->whole += 2 * HALF;
        from->odd++;
    }
    return line;
}

#endif
