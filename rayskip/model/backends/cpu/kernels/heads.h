/* Attention of some query heads, of one or several tokens of one row, to one key-value head: scores, their softmax, and the
 * weighted sum of values. Scores and sum are products with panels, since keys and values lie in the cache's pages as
 * such. */
#ifndef HEADS_H
#define HEADS_H

#include <stdbool.h>

#include "blocks.h"

#define PAGE 64 /* positions of a page: whole panels of keys, and whole steps of GRAIN values */
_Static_assert(PAGE % COLUMNS == 0 && COLUMNS % GRAIN == 0, "no panel lies in two pages");

typedef struct {
    int64_t heads, kv_heads, dim; /* H, K, D */
    int64_t window;               /* positions a token sees, its own included; 0: all */
    float scale;                  /* of q.k */
    float softcap;                /* on the scores; 0: none */
    const float *sinks;           /* [H]: of each head one score more, without a value; NULL: none */
    int64_t length;               /* T: positions that any token of the step sees; filled in by `shape_for` */
} Shape;

/* A step's tokens: see TokenBatch in ops.py. starts [N], after [N, branch]: see Path; NULL where every key lies at its own
 * position, as without a draft's tree. A row's block table has `blocks` entries. */
typedef struct {
    const int64_t *slots, *positions, *places, *starts, *after;
    int64_t branch, blocks;
} Step;

/* The shape with the length of a step of so many tokens. */
INLINE Shape shape_for(Shape shape, const Step *step, int64_t tokens) {
    shape.length = 0;
    for (int64_t token = 0; token < tokens; token++)
        if (step->positions[token] >= shape.length)
            shape.length = (step->positions[token] / COLUMNS + 1) * COLUMNS;
    return shape;
}

/* The positions [0, last) that one token sees, and the places in the cache that hold their keys: below `start` the place is
 * the position itself, from there on it is after[position - start]. */
typedef struct {
    int64_t start, last;
    const int64_t *after;
} Path;

INLINE int64_t place_of(const Path *path, int64_t position) {
    return position < path->start || position >= path->last ? position : path->after[position - path->start];
}

/* Where a key begins in a page. Of one head a page has keys [PAGE / COLUMNS, D / DEPTH, COLUMNS, DEPTH]: panels, of which a
 * key is a column. */
INLINE int64_t key_at(int64_t place, int64_t dim) {
    return place / COLUMNS * COLUMNS * dim + place % COLUMNS * DEPTH;
}

/* Where a value begins in a page. Of one head a page has values [PAGE / DEPTH, D, DEPTH]: any COLUMNS dims are a panel, of
 * which a value is a row. */
INLINE int64_t value_at(int64_t place, int64_t dim) { return place / DEPTH * DEPTH * dim + place % DEPTH; }

/* One row's keys and values of one head in one layer. Page table[i] of the cache holds the places from i * PAGE on; `size`
 * elements from one page to the next. */
typedef struct {
    element *keys, *values;
    const int32_t *table;
    int64_t size;
} Pages;

/* How many elements into keys or values the page with a place begins. */
INLINE int64_t page_of(const Pages *pages, int64_t place) { return pages->table[place / PAGE] * pages->size; }

/* Copy one key: `stride` elements from DEPTH dims to the next DEPTH. */
INLINE void copy_key(const element *from, int64_t stride, element *to, int64_t to_stride, int64_t dim) {
    for (int64_t i = 0; i < dim; i += DEPTH, from += stride, to += to_stride)
        memcpy(to, from, DEPTH * sizeof *to);
}

/* Copy one value: `stride` elements from one dim to the next. */
INLINE void copy_value(const element *from, int64_t stride, element *to, int64_t to_stride, int64_t dim) {
    for (int64_t i = 0; i < dim; i++)
        to[i * to_stride] = from[i * stride];
}

/* So many keys, padded to whole panels. */
INLINE int64_t padded_keys(int64_t keys) { return (keys + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* The softmax of scores of keys [first, last), in place, but for the division by the sum of weights, which is returned.
 * Weights of keys before `visible` become 0, and so do those that pad the scores to whole panels. sink: one score more, whose
 * weight is in the sum alone. */
INLINE float softmax(float *scores, int64_t first, int64_t visible, int64_t last, float softcap, float sink) {
    ints lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    const int64_t size = last - first;
    floats best = broadcast(-INFINITY), total = {0};
    for (int64_t i = 0; i < padded_keys(size); i += LANES) {
        floats x;
        memcpy(&x, scores + i, sizeof x);
        if (softcap > 0)
            x = softcap - 2.0f * softcap / (vector_exp(2.0f / softcap * x) + 1.0f);
        if (i + LANES > size || i < visible - first) {
            ints masked = (lane + (int32_t)i >= (int32_t)size) | (lane + (int32_t)i < (int32_t)(visible - first));
            x = blend(masked, broadcast(-INFINITY), x);
        }
        best = vector_max(x, best);
        memcpy(scores + i, &x, sizeof x);
    }
    const float most = fmaxf(reduce_max(best), sink);
    for (int64_t i = 0; i < padded_keys(size); i += LANES) {
        floats x;
        memcpy(&x, scores + i, sizeof x);
        x = blend(x == -INFINITY, broadcast(0), vector_exp(x - most));
        total += x;
        memcpy(scores + i, &x, sizeof x);
    }
    return reduce_sum(total) + expf(sink - most);
}

/* Round weights [size] to operands, in place. */
INLINE void round_weights(float *weights, int64_t size) {
#ifdef PAIRS
    for (int64_t i = 0; i < size; i += LANES) {
        floats wide;
        memcpy(&wide, weights + i, sizeof wide);
        store((element *)weights + i, wide);
    }
#endif
}

/* One worker's workspace for attention. scores [BLOCK, scores_stride], queries [BLOCK, D]. keys, values: a panel of COLUMNS
 * positions, gathered. last: the last values, padded with zeros to GRAIN positions. */
typedef struct {
    float *scores;
    operand *queries;
    element *keys, *values, *last;
} Workspace;

/* Floats from one query's scores to the next one's: T and a cache line more, since rows 4 KB apart share a set of the
 * cache. */
INLINE int64_t scores_stride(const Shape *shape) { return shape->length + 64 / (int64_t)sizeof(float); }

INLINE int64_t workspace_bytes(const Shape *shape) {
    return BLOCK * (scores_stride(shape) + shape->dim) * (int64_t)sizeof(float) +
           (2 * COLUMNS + GRAIN) * shape->dim * (int64_t)sizeof(element) + 64;
}

/* The workspace in memory that begins at `at`, aligned to 64 bytes. */
INLINE Workspace workspace_at(const Shape *shape, char *at) {
    Workspace workspace = {.scores = (float *)at};
    workspace.queries = (operand *)(workspace.scores + BLOCK * scores_stride(shape));
    workspace.keys = (element *)(workspace.queries + BLOCK * shape->dim);
    workspace.values = workspace.keys + COLUMNS * shape->dim;
    workspace.last = workspace.values + COLUMNS * shape->dim;
    return workspace;
}

/* Queries that share one reading of keys and values: query heads [head, head + heads) of each of `tokens` tokens of one row. q, out
 * [tokens, heads, D], `stride` and `out_stride` elements from one token to the next. */
typedef struct {
    const Shape *shape;
    const element *q;
    Pages pages;
    const Path *paths;
    element *out;
    int64_t stride, out_stride, tokens, head, heads;
    Pages next; /* of the queries that attend next: its keys are prefetched */
    Workspace workspace;
} QueryGroup;

/* The panel of keys [block, block + COLUMNS), as they lie in a page; or the values from `block` on to the page's end. */
INLINE const element *keys_at(const Pages *pages, int64_t block, int64_t dim) {
    return pages->keys + page_of(pages, block) + block % PAGE * dim;
}

INLINE const element *values_at(const Pages *pages, int64_t block, int64_t dim) {
    return pages->values + page_of(pages, block) + block % PAGE * dim;
}

/* Whether a key of [block, block + COLUMNS) that a token sees lies at another place than its position. */
INLINE bool needs_gather(const Path *path, int64_t block) {
    const int64_t last = block + COLUMNS < path->last ? block + COLUMNS : path->last;
    for (int64_t at = path->start > block ? path->start : block; at < last; at++)
        if (place_of(path, at) != at)
            return true;
    return false;
}

/* The panel of keys [block, block + COLUMNS), or their values, in the order of a token's path: gathered into the workspace
 * if some lie at other places. */
INLINE const element *gathered(const QueryGroup *group, const Path *path, int64_t block, const bool keys) {
    const int64_t dim = group->shape->dim;
    const Pages *pages = &group->pages;
    const element *stored = keys ? keys_at(pages, block, dim) : values_at(pages, block, dim);
    element *workspace = keys ? group->workspace.keys : group->workspace.values;
    if (!needs_gather(path, block))
        return stored;
    memcpy(workspace, stored, COLUMNS * dim * sizeof *workspace);
    for (int64_t at = 0; at < COLUMNS; at++) {
        const int64_t place = place_of(path, block + at), page = page_of(pages, place);
        if (place == block + at)
            continue;
        if (keys)
            copy_key(pages->keys + page + key_at(place % PAGE, dim), COLUMNS * DEPTH, workspace + key_at(at, dim),
                     COLUMNS * DEPTH, dim);
        else
            copy_value(pages->values + page + value_at(place % PAGE, dim), DEPTH, workspace + value_at(at, dim), DEPTH,
                       dim);
    }
    return workspace;
}

/* scores [rows, scores_stride] of queries with the keys [block, block + COLUMNS), which are a panel. Prefetches their
 * values. */
static void score_keys(const QueryGroup *group, const operand *queries, const element *panel, int64_t block, float *scores,
                  int64_t rows) {
    const int64_t dim = group->shape->dim;
    floats sums[BLOCK][2];
    const element *values = values_at(&group->pages, block, dim);
    const PanelProduct from = {queries, dim, dim, panel, COLUMNS * DEPTH, values, COLUMNS * DEPTH, {0}};
    add_block(&from, sums, false, true, rows);
    for (int64_t row = 0; row < rows; row++, scores += scores_stride(group->shape))
        for (int half = 0; half < 2; half++) {
            const floats scaled = sums[row][half] * group->shape->scale;
            memcpy(scores + half * LANES, &scaled, sizeof scaled);
        }
}

/* sums [rows, 2 halves] += weights of `count` keys times COLUMNS dims of their values. weights [rows, as scores]. prefetch:
 * what to fetch into the cache meanwhile. */
static void weighted_sum(const QueryGroup *group, const operand *weights, int64_t count, const element *values,
                         const element *prefetch, floats (*sums)[2], int64_t rows) {
    const int64_t stride = scores_stride(group->shape) * (int64_t)(sizeof(float) / sizeof(operand));
    const PanelProduct from = {weights, stride, count, values, group->shape->dim * DEPTH, prefetch, COLUMNS * DEPTH, {0}};
    add_block(&from, sums, false, false, rows);
}

/* The first `count` of GRAIN values, copied, and zeros for the others: those in the cache may not be finite, and neither is
 * 0 times them then. */
INLINE const element *first_values(const QueryGroup *group, const element *values, int64_t count) {
    const int64_t line = group->shape->dim * DEPTH, whole = count / DEPTH * line;
    element *last = group->workspace.last;
    memcpy(last, values, whole * sizeof *last);
    memset(last + whole, 0, (GRAIN / DEPTH * line - whole) * sizeof *last);
    if (count % DEPTH)
        for (int64_t i = 0; i < line; i += DEPTH)
            last[whole + i] = values[whole + i];
    return last;
}

/* out = attention of a group of queries. Keys before `common` are the same for all tokens and lie at their positions: one
 * product scores them for all queries, and one sums up their values. The others are of each token's own path. With a window
 * that hides keys from a token, the group has no other token. */
static void attend_group(const QueryGroup *group) {
    const Shape *shape = group->shape;
    const Path *paths = group->paths;
    const int64_t dim = shape->dim, heads = group->heads, tokens = group->tokens, rows = tokens * heads;
    const int64_t parts = (dim + COLUMNS - 1) / COLUMNS, stride = scores_stride(shape);
    const int64_t visible = shape->window && shape->window < paths->last ? paths->last - shape->window : 0;
    const int64_t first = visible / COLUMNS * COLUMNS;
    operand *queries = group->workspace.queries;
    float *scores = group->workspace.scores, totals[BLOCK];
    int64_t common = INT64_MAX; /* all tokens see the keys before it, at their positions */
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t straight = paths[token].start < paths[token].last ? paths[token].start : paths[token].last;
        common = straight / COLUMNS * COLUMNS < common ? straight / COLUMNS * COLUMNS : common;
        copy_operands(group->q + token * group->stride, queries + token * heads * dim, heads * dim);
    }
    common = common < first ? first : common;
    begin_blocks(rows, 1, false);
    for (int64_t block = first; block < common; block += COLUMNS)
        score_keys(group, queries, keys_at(&group->pages, block, dim), block, scores + block - first, rows);

    floats sums[parts][BLOCK][2];
    for (int64_t part = 0; part < parts; part++)
        memset(sums[part], 0, rows * sizeof *sums[part]);
    for (int64_t token = 0; token < tokens; token++) {
        const Path *path = paths + token;
        float *own = scores + token * heads * stride;
        begin_blocks(heads, 1, false);
        for (int64_t block = common; block < path->last; block += COLUMNS)
            score_keys(group, queries + token * heads * dim, gathered(group, path, block, true), block,
                       own + block - first, heads);
        for (int64_t head = 0; head < heads; head++) {
            const float sink = shape->sinks ? shape->sinks[group->head + head] : -INFINITY;
            totals[token * heads + head] = softmax(own + head * stride, first, visible, path->last, shape->softcap, sink);
            round_weights(own + head * stride, padded_keys(path->last - first));
        }
    }
    if (common > first)
        begin_blocks(rows, 1, false);
    for (int64_t block = first, count; block < common; block += count) { /* one page at a time */
        count = PAGE - block % PAGE < common - block ? PAGE - block % PAGE : common - block;
        const element *values = values_at(&group->pages, block, dim);
        const element *next_keys = keys_at(&group->next, block, dim);
        for (int64_t part = 0; part < parts; part++, next_keys += count * COLUMNS)
            weighted_sum(group, (operand *)scores + block - first, count, values + part * COLUMNS * DEPTH, next_keys,
                         sums[part], rows);
    }
    for (int64_t token = 0; token < tokens; token++) {
        const Path *path = paths + token;
        const int64_t row = token * heads;
        begin_blocks(heads, 1, false);
        const operand *weights = (const operand *)(scores + row * stride) + common - first;
        for (int64_t block = common; block < path->last; block += COLUMNS, weights += COLUMNS) {
            const int64_t count = block + COLUMNS < path->last ? COLUMNS : path->last - block;
            const int64_t whole = count / GRAIN * GRAIN;
            const element *values = gathered(group, path, block, false);
            const element *next_keys = keys_at(&group->next, block, dim);
            if (whole)
                for (int64_t part = 0; part < parts; part++, next_keys += whole * COLUMNS)
                    weighted_sum(group, weights, whole, values + part * COLUMNS * DEPTH, next_keys, sums[part] + row,
                                 heads);
            if (whole < count) {
                const element *last = first_values(group, values + whole * dim, count - whole);
                for (int64_t part = 0; part < parts; part++, next_keys += GRAIN * COLUMNS)
                    weighted_sum(group, weights + whole, GRAIN, last + part * COLUMNS * DEPTH, next_keys, sums[part] + row,
                                 heads);
            }
        }
        for (int64_t head = 0; head < heads; head++)
            for (int64_t i = 0; i < dim; i += LANES)
                store(group->out + token * group->out_stride + head * dim + i,
                      sums[i / COLUMNS][row + head][i / LANES % 2] / totals[row + head]);
    }
}

#endif
