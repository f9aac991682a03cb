/* Rotary embedding, the writes to the KV cache, and attention of a step's tokens. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "heads.h"
#include "outputs.h"
#include "thread_pool.h"

/* Rotary embedding of the first `rotary_dims` dims of one head, whose halves are rotated against each other. */
INLINE void rotate(const element *x, element *out, const element *cosines, const element *sines, int64_t rotary_dims) {
    int64_t half = rotary_dims / 2, i = 0;
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

/* Rotary embedding of q [N, H, D] and k [N, K, D], in place, of tokens [first, last). stride: elements from one token to
 * the next, in q and in k. cosines, sines [positions, rotary_dims]. */
static void rotate_tokens(const Shape *shape, element *q, element *k, const int64_t stride[2], const element *cosines,
                          const element *sines, int64_t rotary_dims, const Step *step, int64_t first, int64_t last) {
    const int64_t dim = shape->dim;
    for (int64_t token = first; rotary_dims && token < last; token++) {
        const int64_t angle = step->positions[token] * rotary_dims;
        element *q_row = q + token * stride[0], *k_row = k + token * stride[1];
        for (int64_t head = 0; head < shape->heads; head++)
            rotate(q_row + head * dim, q_row + head * dim, cosines + angle, sines + angle, rotary_dims);
        for (int64_t head = 0; head < shape->kv_heads; head++)
            rotate(k_row + head * dim, k_row + head * dim, cosines + angle, sines + angle, rotary_dims);
    }
}

/* The cache's pages: keys and values [pages, K, one head's part of a page: see heads.h], and one layer's block table [rows,
 * blocks]. k, v [N, K, D]: those of a step's tokens, to be stored; `stride` elements from one token to the next, in k and
 * in v. */
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

/* Store one token's key and value of one head at the token's place. */
INLINE void store_head(const Shape *shape, const Step *step, const Stored *stored, int64_t token, int64_t head) {
    const int64_t dim = shape->dim, place = step->places[token];
    const Pages pages = pages_of(shape, step, stored, token, head);
    const int64_t page = page_of(&pages, place);
    copy_key(stored->k + token * stored->stride[0] + head * dim, DEPTH, pages.keys + page + key_at(place % PAGE, dim),
             COLUMNS * DEPTH, dim);
    copy_value(stored->v + token * stored->stride[1] + head * dim, 1, pages.values + page + value_at(place % PAGE, dim),
               DEPTH, dim);
}

/* Store those of tokens [first, last), of all heads. */
static void store_tokens(const Shape *shape, const Step *step, const Stored *stored, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token++)
        for (int64_t head = 0; head < shape->kv_heads; head++)
            store_head(shape, step, stored, token, head);
}

/* Whether a token's key and value may be stored when it attends, of a step whose tokens have places of their own: no token
 * of its slot that it sees comes later, and none is another worker's. (Where D is no multiple of COLUMNS a head's last
 * values are read with the first ones behind them, which another worker may be storing: those sums are dropped.) */
static bool may_store_late(const Step *step, int64_t tokens, const ThreadPool *pool) {
    uint64_t seen[64] = {0}; /* slots, a bit each */
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t slot = step->slots[token];
        if (token && slot == step->slots[token - 1]) {
            if (pool->count > 1 || step->positions[token] < step->positions[token - 1])
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

/* How many query heads of one key-value head attend together: all, or parts of about the same size. */
INLINE int64_t heads_of(const Shape *shape) {
    const int64_t shared = shape->heads / shape->kv_heads, parts = (shared + HEADS - 1) / HEADS;
    return (shared + parts - 1) / parts;
}

/* Successive tokens [first, last) of one row, in groups of `size` that attend together and share the reading of its
 * keys. */
typedef struct {
    int64_t first, last, size;
} TokenRun;

/* The run that begins with token `first`: tokens that see all keys before them, in groups of about the same size, enough
 * for all workers. A token from which a window hides keys is alone. */
INLINE TokenRun token_run(const Shape *shape, const Step *step, int64_t first, int64_t tokens, int64_t workers) {
    const int64_t most = BLOCK / heads_of(shape);
    int64_t count = 1;
    if (shape->window && step->positions[first] >= shape->window)
        return (TokenRun){first, first + 1, 1};
    while (count < 4 * most && first + count < tokens && step->slots[first + count] == step->slots[first] &&
           !(shape->window && step->positions[first + count] >= shape->window))
        count++;
    int64_t groups = (count + most - 1) / most;
    if (groups < workers)
        groups = workers < count ? workers : count;
    return (TokenRun){first, first + count, (count + groups - 1) / groups};
}

/* An item of work: one of a run's groups, for one key-value head. number: of the run. */
typedef struct {
    TokenRun run;
    int64_t number, group, kv_head;
} Item;

/* Go on to the worker's next item; false: there is none. First all runs' items of one key-value head: tokens of one row, and
 * of rows that share pages, find what they read in the cache. Of a run's items, its groups for one head after the other,
 * neighbours go to the same worker, and each run begins with another one. */
static bool next_item(const Shape *shape, const Step *step, int64_t tokens, int64_t worker, int64_t workers, Item *item) {
    for (;;) {
        const TokenRun *run = &item->run;
        if (run->first + ++item->group * run->size >= run->last) {
            if (run->last == tokens && ++item->kv_head == shape->kv_heads)
                return false;
            item->number = run->last == tokens ? 0 : item->number + 1;
            item->run = token_run(shape, step, run->last == tokens ? 0 : run->last, tokens, workers);
            item->group = 0;
        }
        const int64_t groups = (run->last - run->first + run->size - 1) / run->size;
        const int64_t at = item->kv_head * groups + item->group;
        if ((item->number + at * workers / (groups * shape->kv_heads)) % workers == worker)
            return true;
    }
}

/* One worker's part of causal attention: each token attends to its own row's keys up to its own position. q [N, H, D],
 * `stride` elements from one token to the next -> to [N, H * D]. D: a multiple of LANES, T of COLUMNS. late: see
 * may_store_late. */
static void attend_items(const Shape *shape, const Step *step, const element *q, int64_t stride, const Stored *stored,
                         const bool late, Workspace workspace, Outputs to, int64_t tokens, int64_t worker,
                         int64_t workers) {
    const int64_t dim = shape->dim, shared = shape->heads / shape->kv_heads;
    Item next = {{0, 0, 1}, -1, -1, 0};
    bool more = tokens && next_item(shape, step, tokens, worker, workers, &next);
    while (more) {
        const Item item = next;
        more = next_item(shape, step, tokens, worker, workers, &next);
        const TokenRun run = item.run;
        const int64_t kv_head = item.kv_head, token = run.first + item.group * run.size;
        const int64_t size = token + run.size < run.last ? run.size : run.last - token;
        Path paths[BLOCK];
        for (int64_t i = 0; i < size; i++) {
            paths[i] = path_of(step, token + i);
            if (late)
                store_head(shape, step, stored, token + i, kv_head);
        }
        const Pages own = pages_of(shape, step, stored, token, kv_head);
        const Pages next_pages =
            more ? pages_of(shape, step, stored, next.run.first + next.group * next.run.size, next.kv_head) : own;
        for (int64_t head = kv_head * shared, last = head + shared, count; head < last; head += count) {
            count = last - head < heads_of(shape) ? last - head : heads_of(shape);
            const QueryGroup group = {shape, q + token * stride + head * dim, own, paths,
                                      to.out + token * to.stride + head * dim, stride, to.stride, size, head, count,
                                      next_pages, workspace};
            attend_group(&group);
        }
    }
    end_blocks();
}

#endif
