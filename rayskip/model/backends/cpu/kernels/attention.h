/* Rotary embedding, the writes to the KV cache, and attention of a step's tokens. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "heads.h"
#include "outputs.h"
#include "team.h"

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

/* Turns q [N, H, D] and k [N, K, D] in place, of tokens [first, last). stride: elements from one token to the next, in q and
 * in k. cosines, sines: [positions, turned]. */
static void rotate_tokens(const Shape *shape, element *q, element *k, const int64_t stride[2], const element *cosines,
                          const element *sines, int64_t turned, const Step *step, int64_t first, int64_t last) {
    const int64_t dim = shape->dim;
    for (int64_t token = first; turned && token < last; token++) {
        const int64_t turn = step->positions[token] * turned;
        element *q_row = q + token * stride[0], *k_row = k + token * stride[1];
        for (int64_t head = 0; head < shape->heads; head++)
            rotate(q_row + head * dim, q_row + head * dim, cosines + turn, sines + turn, turned);
        for (int64_t head = 0; head < shape->kv_heads; head++)
            rotate(k_row + head * dim, k_row + head * dim, cosines + turn, sines + turn, turned);
    }
}

/* The cache's pages, keys and values [pages, K] times what heads.h has of a head, and one layer's block table [rows, blocks].
 * k, v [N, K, D]: what a step's tokens add, `stride` elements from one token to the next, in k and in v. */
typedef struct {
    element *keys, *values;
    const int32_t *table;
    const element *k, *v;
    int64_t stride[2];
} Stored;

/* The pages of a token's row, of one key-value head. */
INLINE Pages pages_of(const Shape *shape, const Step *step, const Stored *stored, int64_t token, int64_t kv_head) {
    const int64_t size = PAGE * shape->dim;
    return (Pages){stored->keys + kv_head * size, stored->values + kv_head * size,
                   stored->table + step->slots[token] * step->blocks, shape->kv_heads * size};
}

/* Store one token's key and value of one head, at the step's place. */
INLINE void store_head(const Shape *shape, const Step *step, const Stored *stored, int64_t token, int64_t head) {
    const int64_t dim = shape->dim, place = step->places[token];
    const Pages pages = pages_of(shape, step, stored, token, head);
    const int64_t page = page_of(&pages, place);
    copy_key(stored->k + token * stored->stride[0] + head * dim, DEPTH, pages.keys + page + key_at(place % PAGE, dim),
             COLUMNS * DEPTH, dim);
    copy_value(stored->v + token * stored->stride[1] + head * dim, 1, pages.values + page + value_at(place % PAGE, dim),
               DEPTH, dim);
}

/* Of tokens [first, last), all heads. */
static void store_tokens(const Shape *shape, const Step *step, const Stored *stored, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token++)
        for (int64_t head = 0; head < shape->kv_heads; head++)
            store_head(shape, step, stored, token, head);
}

/* Whether a token's key and value may be stored when it attends, of a step whose tokens have places of their own: no token
 * of its slot that it sees comes later, and none is another worker's. (Where D is no multiple of COLUMNS a head's last
 * values are read with the first ones behind them, which another worker may be storing: those sums are dropped.) */
static bool may_store_late(const Step *step, int64_t tokens, const Team *team) {
    uint64_t seen[64] = {0}; /* slots, a bit each */
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t slot = step->slots[token];
        if (token && slot == step->slots[token - 1]) {
            if (team->count > 1 || step->positions[token] < step->positions[token - 1])
                return false;
            continue;
        }
        if (slot >= 64 * 64 || seen[slot / 64] >> slot % 64 & 1)
            return false;
        seen[slot / 64] |= (uint64_t)1 << slot % 64;
    }
    return true;
}

INLINE Path path_of(const Step *step, int64_t token) {
    const int64_t last = step->positions[token] + 1;
    return (Path){step->starts ? step->starts[token] : last, last,
                  step->starts ? step->after + token * step->branch : NULL};
}

/* Query heads of one key-value head that attend together: all, or parts of like size. */
INLINE int64_t heads_of(const Shape *shape) {
    const int64_t shared = shape->heads / shape->kv_heads, parts = (shared + HEADS - 1) / HEADS;
    return (shared + parts - 1) / parts;
}

/* Tokens from `first` on that see one slot's keys and share their reading: `size` at a time attend as one. */
typedef struct {
    int64_t first, last, size;
} Run;

/* Tokens that see all keys before them, in groups of like size, enough for all workers; another is alone. */
INLINE Run run_of(const Shape *shape, const Step *step, int64_t first, int64_t tokens, int64_t workers) {
    const int64_t most = BLOCK / heads_of(shape);
    int64_t count = 1;
    if (shape->window && step->positions[first] >= shape->window)
        return (Run){first, first + 1, 1};
    while (count < 4 * most && first + count < tokens && step->slots[first + count] == step->slots[first] &&
           !(shape->window && step->positions[first + count] >= shape->window))
        count++;
    int64_t groups = (count + most - 1) / most;
    if (groups < workers)
        groups = workers < count ? workers : count;
    return (Run){first, first + count, (count + groups - 1) / groups};
}

/* Which of `every` workers has a run's item `at` of `items`: neighbours have one, and the first worker is another one in
 * every run. */
INLINE int64_t worker_of(int64_t run, int64_t at, int64_t items, int64_t every) {
    return (run + at * every / items) % every;
}

/* Causal attention of tokens over their own rows' keys up to their own positions: q [N, H, D] with `stride` elements
 * between tokens -> to [N, H * D]. D: a multiple of LANES, T of COLUMNS. late: tokens' own keys and values are stored here.
 * A run's items are its groups for every key-value head in turn; done are those of one worker of `every`. */
static void attend_items(const Shape *shape, const Step *step, const element *q, int64_t stride, const Stored *stored,
                         const bool late, Room room, Outputs to, int64_t tokens, int64_t worker, int64_t every) {
    const int64_t dim = shape->dim, shared = shape->heads / shape->kv_heads;
    int64_t number = 0;
    for (Run run = {0, 0, 0}; run.last < tokens; number++) {
        run = run_of(shape, step, run.last, tokens, every);
        const int64_t groups = (run.last - run.first + run.size - 1) / run.size, items = groups * shape->kv_heads;
        for (int64_t at = 0; at < items; at++) {
            if (worker_of(number, at, items, every) != worker)
                continue;
            const int64_t kv_head = at / groups, token = run.first + at % groups * run.size;
            const int64_t size = token + run.size < run.last ? run.size : run.last - token;
            Path paths[BLOCK];
            for (int64_t i = 0; i < size; i++) {
                paths[i] = path_of(step, token + i);
                if (late)
                    store_head(shape, step, stored, token + i, kv_head);
            }
            int64_t next = at + 1, later = token; /* the worker's next item: in this run, or in one that is like it */
            if (next == items || worker_of(number, next, items, every) != worker) {
                later = run.last == tokens ? token : run.last;
                for (next = 0; next < items - 1 && worker_of(number + 1, next, items, every) != worker;)
                    next++;
            }
            const Pages own = pages_of(shape, step, stored, token, kv_head);
            const Pages soon = pages_of(shape, step, stored, later, next / groups);
            for (int64_t head = kv_head * shared, last = head + shared, count; head < last; head += count) {
                count = last - head < heads_of(shape) ? last - head : heads_of(shape);
                const Group group = {shape, q + token * stride + head * dim, own, paths,
                                     to.out + token * to.apart + head * dim, stride, to.apart, size, count,
                                     soon, room};
                attend_group(&group);
            }
        }
    }
    end_blocks();
}

#endif
