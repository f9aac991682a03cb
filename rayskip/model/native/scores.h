/* Scores of keys, a whole vector at a time: see heads.h. */
#ifndef SCORES_H
#define SCORES_H

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

#endif
