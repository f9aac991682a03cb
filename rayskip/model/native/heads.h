/* Attention of one key-value head of one token: scores, their softmax, and the sum of values. */
#ifndef HEADS_H
#define HEADS_H

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

/* Where the keys of one token's positions lie: below `start` at the position itself, from there on at `after`. */
typedef struct {
    int64_t start, last;
    const int64_t *after;
} Path;

INLINE int64_t place_of(const Path *path, int64_t position) {
    return position < path->start || position >= path->last ? position : path->after[position - path->start];
}

/* Softmax weights in place of scores [first, last), not yet divided by their sum, which is returned. Those of keys
 * before `visible` become 0. */
INLINE float weigh(float *scores, int64_t first, int64_t visible, int64_t last, float softcap) {
    ints lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
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

#if defined(PAIRS)
#include "heads_pairs.h"
#elif defined(EIGHTS)
#include "heads_eights.h"
#else
#include "heads_plain.h"
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
    blend(scores, room, values, first, last, path, soon, totals, out, count, dim);
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

#endif
