/* Rotary embedding, the writes to the KV cache, and attention. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "vectors.h"

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
        ints hidden = (lane + (int32_t)i >= (int32_t)size) | (lane + (int32_t)i < (int32_t)(visible - first));
        x = pick(hidden, splat(-INFINITY), x);
        best = pick(x > best, x, best);
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

/* out [count, dim] = weights [count, room] over values [first, last), divided by totals; the weights are used up. */
INLINE void mix(float *weights, int64_t room, const element *values, int64_t first, int64_t last, const Path *path,
                const element *soon, const float *totals, element *out, const int count, const int64_t dim) {
    const int64_t straight = path->start < last ? path->start : last;
    narrow(weights, room, last - first, count);
    for (int64_t part = 0; part < dim; part += 4 * LANES) {
        const int64_t width = dim - part < 4 * LANES ? dim - part : 4 * LANES;
        const element *from = values + part;
        floats mixed[4][4] = {0};
        int64_t key = first;
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
    mix(scores, room, values, first, last, path, soon, totals, out, count, dim);
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

/* Causal attention of tokens over their own slots' keys up to their own positions: q [N, H, D] with `stride` elements
 * between tokens, keys and values [slots, K, T, D] of one layer -> out [N, H, D]. D and T: multiples of LANES. Of all
 * (token, key-value head), those numbered `item`, `item + every`, and so on; scores: room for [4, T]. */
static void attend_items(const Shape *shape, const Step *step, const element *q, int64_t stride, const element *keys,
                         const element *values, float *scores, element *out, int64_t tokens, int64_t item,
                         int64_t every) {
    const int64_t dim = shape->dim, shared = shape->heads / shape->kv_heads;
    for (; item < tokens * shape->kv_heads; item += every) {
        const int64_t token = item / shape->kv_heads, kv_head = item % shape->kv_heads;
        const int64_t last = step->positions[token] + 1;
        const Path path = {step->starts ? step->starts[token] : last, last,
                           step->starts ? step->after + token * step->branch : NULL};
        const int64_t next = item + every < tokens * shape->kv_heads ? item + every : item;
        const int64_t place = place_of_item(shape, step, item), soon = place_of_item(shape, step, next);
        attend_shared(shape, q + token * stride + kv_head * shared * dim, keys + place, values + place, &path,
                      keys + soon, scores, out + (token * shape->heads + kv_head * shared) * dim);
    }
}

#endif
