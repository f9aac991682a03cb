/* Rotary embedding, the writes to the KV cache, and attention of a step's tokens. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "heads.h"

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
 * they are worth it. */
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

/* `attend_shared` for several tokens of one slot. */
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
#else
    for (int64_t i = 0; i < tokens; i++) {
        const Path path = path_of(step, token + i);
        attend_shared(shape, q + i * stride, keys, values, &path, keys, scores, out + i * shape->heads * shape->dim);
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
