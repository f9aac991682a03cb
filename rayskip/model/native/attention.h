/* Rotary embedding, the writes to the KV cache, and attention. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "vectors.h"

#ifdef PAIRS
#define TILE 8 /* tokens of one slot whose keys are read together, at most */
#else
#define TILE 1
#endif
#define WORTH 4 /* and at least: for fewer, rearranging keys takes longer than reading them again, from the cache */
#define MOST_PARTS 8 /* vectors of a head's dims in a tile */

typedef struct {
    int64_t heads, kv_heads, dim; /* H, K, D */
    int64_t length;               /* T */
    int64_t window;               /* positions seen, the query's own included; 0: all */
    float scale;                  /* of q.k */
    float softcap;                /* on the scores; 0: none */
} Shape;

/* What a step's tokens are: see TokenBatch. starts [N], after [N, branch]: see Path; NULL where every key lies at its
 * position. */
typedef struct {
    const int64_t *slots, *positions, *places, *starts, *after;
    int64_t branch;
} Step;

/* Rotary embedding of the first `turned` dims of one head, halves layout. */
INLINE void rotate(const element *x, element *out, const element *cosines, const element *sines, int64_t turned) {
    int64_t half = turned / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        floats left = load(x + i), right = load(x + i + half);
        store(out + i, left * load(cosines + i) - right * load(sines + i));
        store(out + i + half, right * load(cosines + i + half) + left * load(sines + i + half));
    }
    for (; i < half; i++) {
        float left = load_one(x[i]), right = load_one(x[i + half]);
        out[i] = round_one(left * load_one(cosines[i]) - right * load_one(sines[i]));
        out[i + half] = round_one(right * load_one(cosines[i + half]) + left * load_one(sines[i + half]));
    }
}

/* Turns q [N, H, D] in place; turns k [N, K, D] and stores it with v [N, K, D] in one layer of the cache, at
 * the step's places. Of the N tokens, [first, last). stride: elements from one token to the next in q, k and v.
 * cosines, sines: [positions, turned]. */
void rotate_and_store(const Shape *shape, element *q, element *k, const element *v, const int64_t stride[3],
                      const element *cosines, const element *sines, int64_t turned, const Step *step, element *keys,
                      element *values, int64_t first, int64_t last) {
    const int64_t dim = shape->dim;
    for (int64_t token = first; token < last; token++) {
        const int64_t turn = step->positions[token] * turned;
        const element *cosine = cosines + turn, *sine = sines + turn;
        element *q_row = q + token * stride[0], *k_row = k + token * stride[1];
        if (turned) {
            for (int64_t head = 0; head < shape->heads; head++)
                rotate(q_row + head * dim, q_row + head * dim, cosine, sine, turned);
            for (int64_t head = 0; head < shape->kv_heads; head++)
                rotate(k_row + head * dim, k_row + head * dim, cosine, sine, turned);
        }
        for (int64_t head = 0; head < shape->kv_heads; head++) {
            int64_t place = ((step->slots[token] * shape->kv_heads + head) * shape->length + step->places[token]) * dim;
            memcpy(keys + place, k_row + head * dim, dim * sizeof *keys);
            memcpy(values + place, v + token * stride[2] + head * dim, dim * sizeof *values);
        }
    }
}

/* Where the keys of one token's positions lie: below `start` at the position itself, from there on at `after`. */
typedef struct {
    int64_t start, last;
    const int64_t *after;
} Path;

INLINE int64_t place_of(const Path *path, int64_t position) {
    return position < path->start || position >= path->last ? position : path->after[position - path->start];
}

/* Scores of `count` query heads of one token against keys [first, last); first is a multiple of LANES, reads run
 * to the next multiple past last. scores [count, room] begin at key `from`. */
INLINE void score(const element *q, const element *keys, float *scores, int64_t room, int64_t from, int64_t first,
                  int64_t last, const Path *path, const element *soon, const int count, const int64_t dim,
                  float scale) {
    for (int64_t block = first; block < last; block += LANES) {
        floats partial[4][LANES];
        for (int key = 0; key < LANES; key++) {
            const element *k = keys + (path ? place_of(path, block + key) : block + key) * dim;
            for (int64_t i = 0; i < dim; i += LINE)
                __builtin_prefetch(soon + (block + key) * dim + i);
            for (int head = 0; head < count; head++)
                partial[head][key] = add_dot((floats){0}, q + head * dim, k, dim);
        }
        for (int head = 0; head < count; head++) {
            floats total = lane_sums(partial[head]) * scale;
            memcpy(scores + head * room + (block - from), &total, sizeof total);
        }
    }
}

/* Softmax weights in place of scores [first, last), not yet divided by their sum, which is returned. Those of keys
 * before `visible` become 0. */
INLINE float weigh(float *scores, int64_t first, int64_t visible, int64_t last, float softcap) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t size = last - first;
    floats best = splat(-INFINITY), total = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        floats x;
        memcpy(&x, scores + i, sizeof x);
        if (softcap > 0)
            x = softcap - 2.0f * softcap / (exponential(2.0f / softcap * x) + 1.0f);
        if (i + LANES > size || i < visible - first) {
            ints hidden = (lane + (int32_t)i >= (int32_t)size) | (lane + (int32_t)i < (int32_t)(visible - first));
            x = pick(hidden, splat(-INFINITY), x);
        }
        best = larger(x, best);
        memcpy(scores + i, &x, sizeof x);
    }
    float most = maximum(best);
    for (int64_t i = 0; i < size; i += LANES) {
        floats x;
        memcpy(&x, scores + i, sizeof x);
        x = pick(x == -INFINITY, splat(0), exponential(x - most));
        total += x;
        memcpy(scores + i, &x, sizeof x);
    }
    return sum(total);
}

#ifdef PAIRS
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
#else
/* out [count, dim] = weights [count, room] over values [first, last), divided by totals. */
INLINE void mix(float *weights, int64_t room, const element *values, int64_t first, int64_t last, const Path *path,
                const element *soon, const float *totals, element *out, const int count, const int64_t dim) {
    const int64_t straight = path->start < last ? path->start : last;
    for (int64_t part = 0; part < dim; part += 4 * LANES) {
        const int parts = dim - part < 4 * LANES ? (int)((dim - part) / LANES) : 4;
        floats mixed[4][4] = {0};
        for (int64_t key = first; key < straight; key++)
            for (int i = 0; i < parts; i++) {
                floats value = load(values + key * dim + part + i * LANES);
                __builtin_prefetch(soon + key * dim + part + i * LANES);
                for (int head = 0; head < count; head++)
                    mixed[head][i] = multiply_add(splat(weights[head * room + key - first]), value, mixed[head][i]);
            }
        for (int64_t key = first > straight ? first : straight; key < last; key++)
            for (int i = 0; i < parts; i++) {
                floats value = load(values + place_of(path, key) * dim + part + i * LANES);
                for (int head = 0; head < count; head++)
                    mixed[head][i] = multiply_add(splat(weights[head * room + key - first]), value, mixed[head][i]);
            }
        for (int head = 0; head < count; head++)
            for (int i = 0; i < parts; i++)
                store(out + head * dim + part + i * LANES, mixed[head][i] / totals[head]);
    }
}
#endif

#ifdef PAIRS
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

INLINE void attend_heads(const Shape *shape, const element *q, const element *keys, const element *values,
                         const Path *path, const element *soon, float *scores, element *out, const int count,
                         const int64_t dim) {
    const int64_t last = path->last, room = shape->length;
    const int64_t visible = shape->window && shape->window < last ? last - shape->window : 0;
    const int64_t first = visible / LANES * LANES;
    int64_t straight = path->start < last ? path->start / LANES * LANES : last;
    float totals[4];
    straight = straight < first ? first : straight;
    score(q, keys, scores, room, first, first, straight, NULL, values, count, dim, shape->scale);
    score(q, keys, scores, room, first, straight, last, path, values, count, dim, shape->scale);
    for (int head = 0; head < count; head++)
        totals[head] = weigh(scores + head * room, first, visible, last, shape->softcap);
#ifdef PAIRS
    narrow(scores, room, last - first, count);
    mix(scores, room, values, first, first, last, path, soon, NULL, totals, out, count, dim);
#else
    mix(scores, room, values, first, last, path, soon, totals, out, count, dim);
#endif
}

/* The number of heads and, where it is a usual one, the dim are known to the compiler. */
INLINE void attend_some(const Shape *shape, const element *q, const element *keys, const element *values,
                        const Path *path, const element *soon, float *scores, element *out, const int count) {
    if (shape->dim == 64)
        attend_heads(shape, q, keys, values, path, soon, scores, out, count, 64);
    else if (shape->dim == 128)
        attend_heads(shape, q, keys, values, path, soon, scores, out, count, 128);
    else
        attend_heads(shape, q, keys, values, path, soon, scores, out, count, shape->dim);
}

/* Attention of one key-value head of one token: q [G, D] -> out [G, D]. scores: room for [4, T]. soon: the keys that
 * are read next; a walk fetches what the next one reads, since the processor foresees nothing past a page. */
static void attend_shared(const Shape *shape, const element *q, const element *keys, const element *values,
                          const Path *path, const element *soon, float *scores, element *out) {
    const int64_t dim = shape->dim, shared = shape->heads / shape->kv_heads;
    for (int64_t head = 0; head < shared; head += 4, q += 4 * dim, out += 4 * dim)
        switch (shared - head) {
        case 1:
            attend_some(shape, q, keys, values, path, soon, scores, out, 1);
            break;
        case 2:
            attend_some(shape, q, keys, values, path, soon, scores, out, 2);
            break;
        case 3:
            attend_some(shape, q, keys, values, path, soon, scores, out, 3);
            break;
        default:
            attend_some(shape, q, keys, values, path, soon, scores, out, 4);
        }
}

/* Where a token's keys of one key-value head begin, in elements; items are numbered token by token. */
INLINE int64_t place_of_item(const Shape *shape, const Step *step, int64_t item) {
    const int64_t token = item / shape->kv_heads, kv_head = item % shape->kv_heads;
    return (step->slots[token] * shape->kv_heads + kv_head) * shape->length * shape->dim;
}

INLINE Path path_of(const Step *step, int64_t token) {
    const int64_t last = step->positions[token] + 1;
    return (Path){step->starts ? step->starts[token] : last, last,
                  step->starts ? step->after + token * step->branch : NULL};
}

/* How many tokens from `token` on attend as one: those of its slot, in tiles of like size, enough for all workers, if
 * they are WORTH it. */
INLINE int64_t tile_of(const Shape *shape, const Step *step, int64_t token, int64_t tokens, int64_t workers) {
    int64_t run = 0;
    if (TILE == 1 || (shape->dim != 64 && shape->dim != 128))
        return 1;
    while (run < 4 * TILE && token + run < tokens && step->slots[token + run] == step->slots[token] &&
           !(shape->window && step->positions[token + run] >= shape->window))
        run++;
    if (run < WORTH)
        return 1;
    int64_t tiles = (run + TILE - 1) / TILE;
    if (tiles < workers)
        tiles = workers < run ? workers : run;
    const int64_t tile = (run + tiles - 1) / tiles;
    return tile < WORTH ? 1 : tile;
}

/* `attend_shared` for several tokens of one slot; as attend_tile. */
static void attend_together(const Shape *shape, const Step *step, int64_t token, int64_t tokens, const element *q,
                            int64_t stride, const element *keys, const element *values, float *scores, element *out) {
#ifdef PAIRS
    const int64_t dim = shape->dim, shared = shape->heads / shape->kv_heads;
    Path paths[TILE];
    for (int64_t i = 0; i < tokens; i++)
        paths[i] = path_of(step, token + i);
    for (int64_t head = 0; head < shared; head += 4, q += 4 * dim, out += 4 * dim) {
        const int64_t count = shared - head < 4 ? shared - head : 4;
#define OF(heads, width) \
    case heads * 1000 + width: \
        attend_tile(shape, q, stride, keys, values, paths, tokens, scores, out, heads, width); \
        break;
        switch (count * 1000 + dim) {
            OF(1, 64) OF(2, 64) OF(3, 64) OF(4, 64) OF(1, 128) OF(2, 128) OF(3, 128) OF(4, 128)
        }
#undef OF
    }
#endif
}

/* Causal attention of tokens over their own slots' keys up to their own positions: q [N, H, D] with `stride` elements
 * between tokens, keys and values [slots, K, T, D] of one layer -> out [N, H, D]. D and T: multiples of LANES. Tiles
 * (see tile_of) and key-value heads are numbered; of all, those numbered `item`, `item + every`, and so on. scores:
 * room for [TILE, 4, T]. */
static void attend_items(const Shape *shape, const Step *step, const element *q, int64_t stride, const element *keys,
                         const element *values, float *scores, element *out, int64_t tokens, int64_t item,
                         int64_t every) {
    const int64_t dim = shape->dim, shared = shape->heads / shape->kv_heads, whole = tokens * shape->kv_heads;
    int64_t number = 0;
    for (int64_t token = 0, tile; token < tokens; token += tile) {
        tile = tile_of(shape, step, token, tokens, every);
        for (int64_t kv_head = 0; kv_head < shape->kv_heads; kv_head++) {
            if (number++ % every != item)
                continue;
            const int64_t own = token * shape->kv_heads + kv_head, place = place_of_item(shape, step, own);
            const element *from = q + token * stride + kv_head * shared * dim;
            element *to = out + (token * shape->heads + kv_head * shared) * dim;
            if (tile > 1) {
                attend_together(shape, step, token, tile, from, stride, keys + place, values + place, scores, to);
                continue;
            }
            const int64_t next = own + every < whole ? own + every : own;
            const Path path = path_of(step, token);
            attend_shared(shape, from, keys + place, values + place, &path, keys + place_of_item(shape, step, next),
                          scores, to);
        }
    }
}

#endif
