/* Scores and sums of values where the processor multiplies pairs of bfloat16: see heads.h. Here several tokens of a slot
 * attend together. */
#ifndef HEADS_PAIRS_H
#define HEADS_PAIRS_H

#include "scores.h"

#define TILE 8 /* tokens of one slot whose keys are read together, at most */
#define WORTH 4 /* and at least: for fewer, rearranging keys takes longer than reading them again, from the cache */
#define MOST_PARTS 8 /* vectors of a head's dims in a tile */

/* weights [count, room] of keys from `from` on become bfloat16, in place: two neighbours are one operand. */
INLINE void narrow(float *weights, int64_t room, int64_t size, const int count) {
    for (int head = 0; head < count; head++)
        for (int64_t i = 0; i < size; i += LANES) {
            floats wide;
            memcpy(&wide, weights + head * room + i, sizeof wide);
            store((element *)(weights + head * room) + i, wide);
        }
}

/* mixed += weights of two neighbouring keys, the first of them `at` after the first key of all, times their values
 * [width]. Of 32 dims, mixed holds 0..3, 8..11, 16..19, 24..27, then the others. */
INLINE void mix_pair(floats mixed[4][4], const float *weights, int64_t room, int64_t at, const element *even,
                     const element *odd, const int64_t width, const int count) {
    for (int64_t i = 0; i < width; i += 2 * LANES) {
        __m512i first = (__m512i)load_pairs(even + i, width - i), second = (__m512i)load_pairs(odd + i, width - i);
        __m512bh left = (__m512bh)_mm512_unpacklo_epi16(first, second);
        __m512bh right = (__m512bh)_mm512_unpackhi_epi16(first, second);
        for (int head = 0; head < count; head++) {
            int32_t both;
            memcpy(&both, (const element *)(weights + head * room) + at, sizeof both);
            __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
            floats *to = mixed[head] + i / LANES;
            to[0] = (floats)_mm512_dpbf16_ps((__m512)to[0], left, weight);
            to[1] = (floats)_mm512_dpbf16_ps((__m512)to[1], right, weight);
        }
    }
}

/* out [count, dim] = weights [count, room] of keys from `first` on over values [begin, last), added to `begun`
 * [count, dim] (NULL: zeros; dims as in mix_pair) and divided by totals. */
INLINE void mix(const float *weights, int64_t room, const element *values, int64_t first, int64_t begin, int64_t last,
                const Path *path, const element *soon, floats (*begun)[MOST_PARTS], const float *totals, element *out,
                const int count, const int64_t dim) {
    const int64_t straight = path->start < last ? path->start : last;
    for (int64_t part = 0; part < dim; part += 4 * LANES) {
        const int64_t width = dim - part < 4 * LANES ? dim - part : 4 * LANES;
        const element *from = values + part;
        floats mixed[4][4] = {0};
        if (begun)
            for (int head = 0; head < count; head++)
                memcpy(mixed[head], begun[head] + part / LANES, sizeof mixed[head]);
        int64_t key = begin;
        for (; key + 1 < straight; key += 2) {
            for (int64_t i = 0; i < width; i += LINE) {
                __builtin_prefetch(soon + key * dim + part + i);
                __builtin_prefetch(soon + (key + 1) * dim + part + i);
            }
            mix_pair(mixed, weights, room, key - first, from + key * dim, from + (key + 1) * dim, width, count);
        }
        for (; key < last; key += 2)
            mix_pair(mixed, weights, room, key - first, from + place_of(path, key) * dim,
                     from + place_of(path, key + 1) * dim, width, count);
        for (int head = 0; head < count; head++)
            for (int64_t i = 0; i < width; i += 2 * LANES) {
                floats left = mixed[head][i / LANES] / totals[head];
                floats right = mixed[head][i / LANES + 1] / totals[head];
                element *to = out + head * dim + part + i;
                store(to, SHUFFLE(left, right, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
                if (width - i > LANES)
                    store(to + LANES,
                          SHUFFLE(left, right, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
            }
    }
}

/* out [count, dim] = weights [count, room] over values [first, last), divided by totals; the weights are used up. */
INLINE void blend(float *weights, int64_t room, const element *values, int64_t first, int64_t last, const Path *path,
                  const element *soon, const float *totals, element *out, const int count, const int64_t dim) {
    narrow(weights, room, last - first, count);
    mix(weights, room, values, first, first, last, path, soon, NULL, totals, out, count, dim);
}

/* Two neighbouring dims of 16 keys side by side in each of out [dim / 2]: keys [16, dim]. */
INLINE void transpose(const element *keys, __m512i *out, const int64_t dim) {
    for (int64_t part = 0; part < dim; part += 2 * LANES, out += LANES) {
        __m512i x[LANES], y[LANES];
        for (int i = 0; i < LANES; i++)
            x[i] = _mm512_loadu_si512(keys + i * dim + part);
        for (int i = 0; i < LANES; i += 2) {
            y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
            y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        }
        for (int i = 0; i < LANES; i += 4) {
            x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
            x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
            x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
            x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
        }
        for (int i = 0; i < 4; i++) {
            __m512i even = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), odd = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
            __m512i even_later = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
            __m512i odd_later = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
            out[i] = _mm512_shuffle_i32x4(even, even_later, 0x88);
            out[i + 4] = _mm512_shuffle_i32x4(odd, odd_later, 0x88);
            out[i + 8] = _mm512_shuffle_i32x4(even, even_later, 0xdd);
            out[i + 12] = _mm512_shuffle_i32x4(odd, odd_later, 0xdd);
        }
    }
}

INLINE __m512bh spread_pair(const element *from) {
    int32_t both;
    memcpy(&both, from, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

/* What `score` gives for 16 keys, bit by bit, from the keys transposed. q [count, dim]; scores [count, room]. */
INLINE void score_transposed(const element *q, const __m512i *keys, float *scores, int64_t room, const int count,
                             const int64_t dim, float scale) {
    for (int head = 0; head < count; head++) {
        floats sums[LANES];
        for (int lane = 0; lane < LANES; lane++)
            sums[lane] = (floats){0};
        for (int64_t part = 0; part < dim / 2; part += LANES)
            for (int lane = 0; lane < LANES; lane++)
                sums[lane] = (floats)_mm512_dpbf16_ps(
                    (__m512)sums[lane], spread_pair(q + head * dim + 2 * (part + lane)), (__m512bh)keys[part + lane]);
        for (int width = LANES; width > 1; width /= 2)
            for (int i = 0; i < width / 2; i++)
                sums[i] = sums[2 * i] + sums[2 * i + 1];
        floats total = sums[0] * scale;
        memcpy(scores + head * room, &total, sizeof total);
    }
}

/* Values of two neighbouring keys side by side, as mix_pair takes them: values [16, dim] -> out [8, dim / 16]. */
INLINE void interleave(const element *values, __m512i *out, const int64_t dim) {
    for (int key = 0; key < LANES; key += 2)
        for (int64_t part = 0; part < dim; part += 2 * LANES) {
            __m512i even = _mm512_loadu_si512(values + key * dim + part);
            __m512i odd = _mm512_loadu_si512(values + (key + 1) * dim + part);
            *out++ = _mm512_unpacklo_epi16(even, odd);
            *out++ = _mm512_unpackhi_epi16(even, odd);
        }
}

/* mixed [count, dim / 16] += weights [count, room] of 16 keys, narrowed, the first of them `at` after the first key of
 * all, times their values interleaved. */
INLINE void mix_interleaved(floats (*mixed)[MOST_PARTS], const float *weights, int64_t room, int64_t at,
                            const __m512i *values, const int count, const int64_t dim) {
    for (int64_t part = 0; part < dim / LANES; part += 4) {
        floats sums[4][4];
        for (int head = 0; head < count; head++)
            memcpy(sums[head], mixed[head] + part, sizeof sums[head]);
        for (int key = 0; key < LANES; key += 2)
            for (int head = 0; head < count; head++) {
                __m512bh weight = spread_pair((const element *)(weights + head * room) + at + key);
                for (int i = 0; i < 4; i++)
                    sums[head][i] = (floats)_mm512_dpbf16_ps(
                        (__m512)sums[head][i], (__m512bh)values[key / 2 * (dim / LANES) + part + i], weight);
            }
        for (int head = 0; head < count; head++)
            memcpy(mixed[head] + part, sums[head], sizeof sums[head]);
    }
}

/* What attend_heads gives for each of some tokens of one slot, bit by bit: keys and values that all of them see are
 * loaded and rearranged once. q, out: of the first token; paths [tokens]; scores: room for [TILE, 4, T]. */
INLINE void attend_tile(const Shape *shape, const element *q, int64_t stride, const element *keys,
                        const element *values, const Path *paths, int64_t tokens, float *scores, element *out,
                        const int count, const int64_t dim) {
    const int64_t room = shape->length, width = shape->heads * dim;
    int64_t common = paths[0].last;
    for (int64_t token = 0; token < tokens; token++) {
        common = paths[token].last < common ? paths[token].last : common;
        common = paths[token].start < common ? paths[token].start : common;
    }
    common = common / LANES * LANES;
    __m512i shared[MOST_PARTS * LANES / 2];
    for (int64_t block = 0; block < common; block += LANES) {
        transpose(keys + block * dim, shared, dim);
        for (int64_t token = 0; token < tokens; token++)
            score_transposed(q + token * stride, shared, scores + token * 4 * room + block, room, count, dim,
                             shape->scale);
    }
    float totals[TILE][4];
    for (int64_t token = 0; token < tokens; token++) {
        const Path *path = paths + token;
        float *own = scores + token * 4 * room;
        const int64_t straight = path->start < path->last ? path->start / LANES * LANES : path->last;
        score(q + token * stride, keys, own, room, 0, common, straight, NULL, values, count, dim, shape->scale);
        score(q + token * stride, keys, own, room, 0, straight, path->last, path, values, count, dim, shape->scale);
        for (int head = 0; head < count; head++)
            totals[token][head] = weigh(own + head * room, 0, 0, path->last, shape->softcap);
        narrow(own, room, path->last, count);
    }
    floats mixed[TILE][4][MOST_PARTS];
    memset(mixed, 0, sizeof mixed);
    for (int64_t block = 0; block < common; block += LANES) {
        interleave(values + block * dim, shared, dim);
        for (int64_t token = 0; token < tokens; token++)
            mix_interleaved(mixed[token], scores + token * 4 * room, room, block, shared, count, dim);
    }
    for (int64_t token = 0; token < tokens; token++)
        mix(scores + token * 4 * room, room, values, 0, common, paths[token].last, paths + token, keys, mixed[token],
            totals[token], out + token * width, count, dim);
}
#endif
