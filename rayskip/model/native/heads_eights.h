/* Scores and sums of values with registers of eight floats: see heads.h. */
#ifndef HEADS_EIGHTS_H
#define HEADS_EIGHTS_H

#include "vectors.h"

#define TILE 8 /* tokens of one slot that attend in turn to one head's keys, which are in the cache then */
#define WORTH 2

/* Sixteen neighbouring dims: of bfloat16 the even ones and the odd ones, which takes no shuffling. */
typedef struct {
    floats low, high;
} Dims;

#define DIMS (2 * LANES)

#ifdef BF16
INLINE Dims load_dims(const element *from) {
    bits both;
    memcpy(&both, from, sizeof both);
    return (Dims){(floats)(both << 16), (floats)(both & 0xffff0000)};
}

INLINE void store_dims(element *to, Dims dims) {
    const bits both = (rounded(dims.low) >> 16) | (rounded(dims.high) & 0xffff0000);
    memcpy(to, &both, sizeof both);
}
#else
INLINE Dims load_dims(const element *from) { return (Dims){load(from), load(from + LANES)}; }

INLINE void store_dims(element *to, Dims dims) {
    store(to, dims.low);
    store(to + LANES, dims.high);
}
#endif

INLINE Dims add_dims(Dims to, Dims a, Dims b) {
    return (Dims){multiply_add(a.low, b.low, to.low), multiply_add(a.high, b.high, to.high)};
}

/* Scores of `count` query heads of one token against keys [first, last); first is a multiple of LANES, reads run
 * to the next multiple past last. scores [count, room] begin at key `from`. */
INLINE void score(const element *q, const element *keys, float *scores, int64_t room, int64_t from, int64_t first,
                  int64_t last, const Path *path, const element *soon, const int count, const int64_t dim,
                  float scale) {
    if (first >= last)
        return;
    Dims wide[count * dim / DIMS];
    for (int64_t i = 0; i < count * dim / DIMS; i++)
        wide[i] = load_dims(q + i * DIMS);
    for (int64_t block = first; block < last; block += LANES) {
        floats partial[4][LANES];
        for (int key = 0; key < LANES; key++) {
            const element *k = keys + (path ? place_of(path, block + key) : block + key) * dim;
            for (int64_t i = 0; i < dim; i += LINE)
                __builtin_prefetch(soon + (block + key) * dim + i);
            Dims sums[4] = {0};
            for (int64_t i = 0; i < dim / DIMS; i++) {
                const Dims some = load_dims(k + i * DIMS);
                for (int head = 0; head < count; head++)
                    sums[head] = add_dims(sums[head], wide[head * (dim / DIMS) + i], some);
            }
            for (int head = 0; head < count; head++)
                partial[head][key] = sums[head].low + sums[head].high;
        }
        for (int head = 0; head < count; head++) {
            const floats total = lane_sums(partial[head]) * scale;
            memcpy(scores + head * room + (block - from), &total, sizeof total);
        }
    }
}

/* `parts` x DIMS dims of `blend`. */
INLINE void blend_dims(const float *weights, int64_t room, const element *values, int64_t first, int64_t last,
                       const Path *path, const element *soon, const float *totals, element *out, const int count,
                       const int64_t dim, const int parts) {
    const int64_t straight = path->start < last ? path->start : last;
    Dims mixed[4][4] = {0};
    for (int64_t key = first; key < last; key++) {
        const element *value = values + (key < straight ? key : place_of(path, key)) * dim;
        __builtin_prefetch(soon + key * dim);
        for (int i = 0; i < parts; i++) {
            const Dims some = load_dims(value + i * DIMS);
            for (int head = 0; head < count; head++) {
                const floats weight = splat(weights[head * room + key - first]);
                mixed[head][i] = add_dims(mixed[head][i], (Dims){weight, weight}, some);
            }
        }
    }
    for (int head = 0; head < count; head++)
        for (int i = 0; i < parts; i++) {
            const Dims done = {mixed[head][i].low / totals[head], mixed[head][i].high / totals[head]};
            store_dims(out + head * dim + i * DIMS, done);
        }
}

/* out [count, dim] = weights [count, room] over values [first, last), divided by totals. */
INLINE void blend(const float *weights, int64_t room, const element *values, int64_t first, int64_t last,
                  const Path *path, const element *soon, const float *totals, element *out, const int count,
                  const int64_t dim) {
    /* as many dims at once as there are registers for their sums */
    const int parts = dim % (4 * DIMS) ? 1 : count == 1 ? 4 : count < 4 ? 2 : 1;
    for (int64_t part = 0; part < dim; part += parts * DIMS)
        blend_dims(weights, room, values + part, first, last, path, soon + part, totals, out + part, count, dim, parts);
}

#endif
