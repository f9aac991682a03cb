/* Scores and sums of values with registers of eight floats: see heads.h. */
#ifndef HEADS_EIGHTS_H
#define HEADS_EIGHTS_H

#include "vectors.h"

#define TILE 8 /* tokens of one slot that attend in turn to one head's keys, which are in the cache then */
#define WORTH 2

/* Sixteen neighbouring dims: of bfloat16 the even ones and the odd ones, which takes no shuffling. */
#ifdef BF16
INLINE Eights load_dims(const element *from) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)from), upper = _mm256_set1_epi32((int)0xffff0000);
    return (Eights){_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
                    _mm256_castsi256_ps(_mm256_and_si256(both, upper))};
}

INLINE void store_dims(element *to, Eights dims) {
    const __m256i odd = _mm256_slli_epi32(round_half(dims.high), 16);
    _mm256_storeu_si256((__m256i *)to, _mm256_or_si256(round_half(dims.low), odd));
}
#else
INLINE Eights load_dims(const element *from) { return (Eights){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

INLINE void store_dims(element *to, Eights dims) {
    _mm256_storeu_ps(to, dims.low);
    _mm256_storeu_ps(to + 8, dims.high);
}
#endif

/* Lane i of the result is the sum over all lanes of x[i]. */
INLINE __m256 sums_of_eight(const __m256 x[8]) {
    const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const __m256 later = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(first, later, 0x20), _mm256_permute2f128_ps(first, later, 0x31));
}

/* Scores of `count` query heads of one token against keys [first, last); first is a multiple of LANES, reads run
 * to the next multiple past last. scores [count, room] begin at key `from`. */
INLINE void score(const element *q, const element *keys, float *scores, int64_t room, int64_t from, int64_t first,
                  int64_t last, const Path *path, const element *soon, const int count, const int64_t dim,
                  float scale) {
    if (first >= last)
        return;
    Eights wide[count * dim / LANES];
    for (int64_t i = 0; i < count * dim / LANES; i++)
        wide[i] = load_dims(q + i * LANES);
    for (int64_t block = first; block < last; block += LANES)
        for (int64_t half = block; half < block + LANES; half += 8) {
            __m256 partial[4][8];
            for (int key = 0; key < 8; key++) {
                const element *k = keys + (path ? place_of(path, half + key) : half + key) * dim;
                for (int64_t i = 0; i < dim; i += LINE)
                    __builtin_prefetch(soon + (half + key) * dim + i);
                Eights sums[4];
                for (int head = 0; head < count; head++)
                    sums[head].low = sums[head].high = _mm256_setzero_ps();
                for (int64_t i = 0; i < dim / LANES; i++) {
                    const Eights some = load_dims(k + i * LANES);
                    for (int head = 0; head < count; head++) {
                        const Eights *own = wide + head * (dim / LANES) + i;
                        sums[head].low = _mm256_fmadd_ps(own->low, some.low, sums[head].low);
                        sums[head].high = _mm256_fmadd_ps(own->high, some.high, sums[head].high);
                    }
                }
                for (int head = 0; head < count; head++)
                    partial[head][key] = _mm256_add_ps(sums[head].low, sums[head].high);
            }
            for (int head = 0; head < count; head++)
                _mm256_storeu_ps(scores + head * room + (half - from),
                                 _mm256_mul_ps(sums_of_eight(partial[head]), _mm256_set1_ps(scale)));
        }
}

/* `parts` x 16 dims of `blend`. */
INLINE void blend_dims(const float *weights, int64_t room, const element *values, int64_t first, int64_t last,
                       const Path *path, const element *soon, const float *totals, element *out, const int count,
                       const int64_t dim, const int parts) {
    const int64_t straight = path->start < last ? path->start : last;
    Eights mixed[4][4];
    for (int head = 0; head < count; head++)
        for (int i = 0; i < parts; i++)
            mixed[head][i].low = mixed[head][i].high = _mm256_setzero_ps();
    for (int64_t key = first; key < last; key++) {
        const element *value = values + (key < straight ? key : place_of(path, key)) * dim;
        __builtin_prefetch(soon + key * dim);
        for (int i = 0; i < parts; i++) {
            const Eights some = load_dims(value + i * LANES);
            for (int head = 0; head < count; head++) {
                const __m256 weight = _mm256_broadcast_ss(weights + head * room + key - first);
                mixed[head][i].low = _mm256_fmadd_ps(weight, some.low, mixed[head][i].low);
                mixed[head][i].high = _mm256_fmadd_ps(weight, some.high, mixed[head][i].high);
            }
        }
    }
    for (int head = 0; head < count; head++)
        for (int i = 0; i < parts; i++) {
            const __m256 total = _mm256_set1_ps(totals[head]);
            Eights done = {_mm256_div_ps(mixed[head][i].low, total), _mm256_div_ps(mixed[head][i].high, total)};
            store_dims(out + head * dim + i * LANES, done);
        }
}

/* out [count, dim] = weights [count, room] over values [first, last), divided by totals. */
INLINE void blend(const float *weights, int64_t room, const element *values, int64_t first, int64_t last,
                  const Path *path, const element *soon, const float *totals, element *out, const int count,
                  const int64_t dim) {
    /* as many dims at once as there are registers for their sums */
    const int parts = dim % (4 * LANES) ? 1 : count == 1 ? 4 : count < 4 ? 2 : 1;
    for (int64_t part = 0; part < dim; part += parts * LANES)
        blend_dims(weights, room, values + part, first, last, path, soon + part, totals, out + part, count, dim, parts);
}

#endif
