/* Scores and sums of values with vectors of the compiler's own: see heads.h. */
#ifndef HEADS_PLAIN_H
#define HEADS_PLAIN_H

#include "scores.h"

#define TILE 1 /* tokens of one slot that attend together */
#define WORTH 2

/* out [count, dim] = weights [count, room] over values [first, last), divided by totals. */
INLINE void blend(const float *weights, int64_t room, const element *values, int64_t first, int64_t last, const Path *path,
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
