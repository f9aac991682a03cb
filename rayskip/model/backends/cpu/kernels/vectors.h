/* Vectors of floats, one register each, and how elements of tensors are loaded into them and stored. Which instructions the
 * processor has is decided here, once: everything else asks for these macros. */
#ifndef VECTORS_H
#define VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(BF16) && defined(__AVX512BF16__)
#define PAIRS /* AVX-512 bf16: the processor multiplies bfloat16 itself, and adds two products at once */
#endif

#if defined(PAIRS) || (!defined(BF16) && defined(__AVX512BW__))
#define SIXTEENS /* AVX-512: registers hold sixteen floats */
#elif defined(__AVX2__) && defined(__FMA__)
#define EIGHTS /* AVX2: registers hold eight floats. Also AVX-512 without bf16, since bfloat16 is widened there as here */
#endif

#if defined(SIXTEENS) || defined(EIGHTS)
#define PRODUCTS /* matrix products of our own; on other processors a library's are faster */
#endif

#if defined(__AMXBF16__) && defined(__AMXINT8__) && !defined(__AMX_BF16__) /* Clang's names before 15 */
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#endif
#if defined(PAIRS) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && !defined(NO_TILES)
#define TILES /* AMX: the processor multiplies sixteen rows of bfloat16 by sixteen columns at once */
#endif

#ifdef EIGHTS
#define LANES 8 /* floats of a register */
#else
#define LANES 16
#endif
#define LINE (64 / (int64_t)sizeof(element)) /* elements of a cache line */
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#ifdef BF16
typedef uint16_t element;

INLINE floats load(const element *from) {
    halves narrow;
    memcpy(&narrow, from, sizeof narrow);
    return (floats)(__builtin_convertvector(narrow, bits) << 16);
}

#ifndef PAIRS
/* Each lane's upper half is x, rounded to nearest even; NaN stays NaN. The lower half is of no use. */
INLINE bits rounded(floats x) {
    const bits raw = (bits)x, nans = (bits)(x != x);
    return ((raw + 0x7fff + ((raw >> 16) & 1)) & ~nans) | (nans & 0x7fc00000);
}
#endif

/* Round to nearest even; NaN stays NaN. */
INLINE void store(element *to, floats x) {
#ifdef PAIRS
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
#elif defined(EIGHTS)
    const __m256i upper = (__m256i)(rounded(x) >> 16);
    __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
#else
    halves narrow = __builtin_convertvector(rounded(x) >> 16, halves);
#endif
    memcpy(to, &narrow, sizeof narrow);
}

INLINE float load_one(element from) {
    uint32_t raw = (uint32_t)from << 16;
    float x;
    memcpy(&x, &raw, sizeof x);
    return x;
}

INLINE element round_one(float x) {
    uint32_t raw;
    memcpy(&raw, &x, sizeof raw);
    return x != x ? 0x7fc0 : (element)((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);
}
#else
typedef float element;

INLINE floats load(const element *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(element *to, floats x) { memcpy(to, &x, sizeof x); }
INLINE float load_one(element from) { return from; }
INLINE element round_one(float x) { return x; }
#endif

/* a * b + c, rounded once where the processor can. The compiler fuses nothing by itself (-ffp-contract=off): it would fuse
 * in one copy of a loop and not in another, and the two would round differently. */
INLINE floats multiply_add(floats a, floats b, floats c) {
#ifdef SIXTEENS
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(EIGHTS)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE floats broadcast(float x) { return x - (floats){0}; }
INLINE floats blend(ints where, floats yes, floats no) {
    return (floats)((where & (ints)yes) | (~where & (ints)no));
}

/* Lane by lane, a where it is larger (smaller), else b. */
INLINE floats vector_max(floats a, floats b) {
#ifdef SIXTEENS
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(EIGHTS)
    return _mm256_max_ps(a, b);
#else
    return blend(a > b, a, b);
#endif
}

INLINE floats vector_min(floats a, floats b) {
#ifdef SIXTEENS
    return (floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(EIGHTS)
    return _mm256_min_ps(a, b);
#else
    return blend(a < b, a, b);
#endif
}

#ifdef EIGHTS
INLINE float reduce_sum(floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_hadd_ps(four, four);
    return _mm_cvtss_f32(_mm_hadd_ps(four, four));
}

INLINE float reduce_max(floats x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
#else
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* Sums of neighbouring lanes, in the lower half and again in the upper one. */
INLINE floats pair_sums(floats x) {
    return SHUFFLE(x, x, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(x, x, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

INLINE float reduce_sum(floats x) {
    for (int i = 0; i < 4; i++)
        x = pair_sums(x);
    return x[0];
}

INLINE float reduce_max(floats x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++)
        best = x[i] > best ? x[i] : best;
    return best;
}
#endif

/* e^x for |x| up to 87, beyond it e^87 or e^-87; relative error below 3e-7 (Cephes' polynomial). */
INLINE floats vector_exp(floats x) {
    const floats magic = broadcast(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = vector_max(broadcast(-87.0f), vector_min(broadcast(87.0f), x));
    floats shifted = multiply_add(x, broadcast(1.44269504f), magic);
    floats power = shifted - magic;
    floats r = multiply_add(power, broadcast(2.12194440e-4f), multiply_add(power, broadcast(-0.693359375f), x));
    floats p = broadcast(1.9875691500e-4f);
    p = multiply_add(p, r, broadcast(1.3981999507e-3f));
    p = multiply_add(p, r, broadcast(8.3334519073e-3f));
    p = multiply_add(p, r, broadcast(4.1665795894e-2f));
    p = multiply_add(p, r, broadcast(1.6666665459e-1f));
    p = multiply_add(p, r, broadcast(5.0000001201e-1f));
    p = multiply_add(p * r, r, r) + 1.0f;
    return (floats)((bits)p + ((bits)shifted << 23));
}

/* to [size] = x as floats. */
INLINE void widen(const element *x, float *to, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        floats some = load(x + i);
        memcpy(to + i, &some, sizeof some);
    }
    for (; i < size; i++)
        to[i] = load_one(x[i]);
}

#endif
