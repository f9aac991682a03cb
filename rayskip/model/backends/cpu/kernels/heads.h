/* Attention of some tokens of one row to the keys of one key-value head: scores, their softmax, and the sum of values.
 * Both are products with panels, since keys and values lie in the cache's pages as such. */
#ifndef HEADS_H
#define HEADS_H

#include <stdbool.h>

#include "blocks.h"

#define PAGE 64 /* positions of a page: whole panels of keys, and whole GRAINs of values */
_Static_assert(PAGE % COLUMNS == 0 && COLUMNS % GRAIN == 0, "no panel lies in two pages");

typedef struct {
    int64_t heads, kv_heads, dim; /* H, K, D */
    int64_t window;               /* positions seen, the query's own included; 0: all */
    float scale;                  /* of q.k */
    float softcap;                /* on the scores; 0: none */
    int64_t length;               /* T: positions that a step's token sees, at most; filled in by `seen` */
} Shape;

/* What a step's tokens are: see TokenBatch. starts [N], after [N, branch]: see Path; NULL where every key lies at its
 * position. A row's block table has `blocks` entries. */
typedef struct {
    const int64_t *slots, *positions, *places, *starts, *after;
    int64_t branch, blocks;
} Step;

/* The shape for a step of so many tokens. */
INLINE Shape seen(Shape shape, const Step *step, int64_t tokens) {
    shape.length = 0;
    for (int64_t token = 0; token < tokens; token++)
        if (step->positions[token] >= shape.length)
            shape.length = (step->positions[token] / COLUMNS + 1) * COLUMNS;
    return shape;
}

/* Where the keys of one token's positions lie: below `start` at the position itself, from there on at `after`. */
typedef struct {
    int64_t start, last;
    const int64_t *after;
} Path;

INLINE int64_t place_of(const Path *path, int64_t position) {
    return position < path->start || position >= path->last ? position : path->after[position - path->start];
}

/* Keys of one head in a page: [PAGE / COLUMNS, D / DEPTH, COLUMNS, DEPTH], panels of which a key is a column. */
INLINE int64_t key_at(int64_t place, int64_t dim) {
    return place / COLUMNS * COLUMNS * dim + place % COLUMNS * DEPTH;
}

/* Values of one head in a page: [PAGE / DEPTH, D, DEPTH], so that any COLUMNS dims are a panel of which a value is a row. */
INLINE int64_t value_at(int64_t place, int64_t dim) { return place / DEPTH * DEPTH * dim + place % DEPTH; }

/* One layer's keys and values of one head: `begin` elements into each page, of which page `table[i]` holds positions from
 * i * PAGE on; `size` elements from one page to the next. */
typedef struct {
    element *keys, *values;
    const int32_t *table;
    int64_t size;
} Pages;

/* Where, from the first page's keys or values of the head on, those of the page with `place` begin. */
INLINE int64_t page_of(const Pages *pages, int64_t place) { return pages->table[place / PAGE] * pages->size; }

/* One key from one place to another: `apart` elements from DEPTH dims to the next. */
INLINE void copy_key(const element *from, int64_t apart, element *to, int64_t to_apart, int64_t dim) {
    for (int64_t i = 0; i < dim; i += DEPTH, from += apart, to += to_apart)
        memcpy(to, from, DEPTH * sizeof *to);
}

/* One value from one place to another: `apart` elements from a dim to the next. */
INLINE void copy_value(const element *from, int64_t apart, element *to, int64_t to_apart, int64_t dim) {
    for (int64_t i = 0; i < dim; i++)
        to[i * to_apart] = from[i * apart];
}

/* To whole panels of keys. */
INLINE int64_t fill_up(int64_t keys) { return (keys + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* Softmax weights in place of scores [first, last), not yet divided by their sum, which is returned. Those of keys
 * before `visible` become 0, and those from `last` on to whole panels, of which all scores are there. */
INLINE float weigh(float *scores, int64_t first, int64_t visible, int64_t last, float softcap) {
    ints lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    const int64_t size = last - first;
    floats best = splat(-INFINITY), total = {0};
    for (int64_t i = 0; i < fill_up(size); i += LANES) {
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
    for (int64_t i = 0; i < fill_up(size); i += LANES) {
        floats x;
        memcpy(&x, scores + i, sizeof x);
        x = pick(x == -INFINITY, splat(0), exponential(x - most));
        total += x;
        memcpy(scores + i, &x, sizeof x);
    }
    return sum(total);
}

/* Weights [size] as operands, in place. */
INLINE void narrow(float *weights, int64_t size) {
#ifdef PAIRS
    for (int64_t i = 0; i < size; i += LANES) {
        floats wide;
        memcpy(&wide, weights + i, sizeof wide);
        store((element *)weights + i, wide);
    }
#endif
}

/* What a worker needs on its way through attention. scores [BLOCK, scores_apart], queries [BLOCK, D]; keys, values: of
 * COLUMNS positions of a path, put together; last: values of GRAIN positions. */
typedef struct {
    float *scores;
    operand *queries;
    element *keys, *values, *last;
} Room;

/* Floats from one query's scores to the next one's: T and a line more, since rows 4 KB apart share a set of the cache. */
INLINE int64_t scores_apart(const Shape *shape) { return shape->length + 64 / (int64_t)sizeof(float); }

INLINE int64_t room_bytes(const Shape *shape) {
    return BLOCK * (scores_apart(shape) + shape->dim) * (int64_t)sizeof(float) +
           (2 * COLUMNS + GRAIN) * shape->dim * (int64_t)sizeof(element) + 64;
}

/* at: 64 bytes aligned. */
INLINE Room room_at(const Shape *shape, char *at) {
    Room room = {.scores = (float *)at};
    room.queries = (operand *)(room.scores + BLOCK * scores_apart(shape));
    room.keys = (element *)(room.queries + BLOCK * shape->dim);
    room.values = room.keys + COLUMNS * shape->dim;
    room.last = room.values + COLUMNS * shape->dim;
    return room;
}

/* Tokens that attend together: q, out [tokens, heads, dim], `stride` and `width` elements from one to the next. */
typedef struct {
    const Shape *shape;
    const element *q;
    Pages pages;
    const Path *paths;
    element *out;
    int64_t stride, width, tokens, heads;
    Pages next; /* whose keys are read next */
    Room room;
} Group;

/* The panel of keys of positions [block, block + COLUMNS), or the values of those from `block` on up to the page's end. */
INLINE const element *keys_at(const Pages *pages, int64_t block, int64_t dim) {
    return pages->keys + page_of(pages, block) + block % PAGE * dim;
}

INLINE const element *values_at(const Pages *pages, int64_t block, int64_t dim) {
    return pages->values + page_of(pages, block) + block % PAGE * dim;
}

/* Whether a key of [block, block + COLUMNS) that a token sees lies elsewhere than at its position. */
INLINE bool strays(const Path *path, int64_t block) {
    const int64_t last = block + COLUMNS < path->last ? block + COLUMNS : path->last;
    for (int64_t at = path->start > block ? path->start : block; at < last; at++)
        if (place_of(path, at) != at)
            return true;
    return false;
}

/* The panel of keys [block, block + COLUMNS), or their values, as a path has them. */
INLINE const element *along(const Group *group, const Path *path, int64_t block, const bool keys) {
    const int64_t dim = group->shape->dim;
    const Pages *pages = &group->pages;
    const element *stored = keys ? keys_at(pages, block, dim) : values_at(pages, block, dim);
    element *room = keys ? group->room.keys : group->room.values;
    if (!strays(path, block))
        return stored;
    memcpy(room, stored, COLUMNS * dim * sizeof *room);
    for (int64_t at = 0; at < COLUMNS; at++) {
        const int64_t place = place_of(path, block + at), page = page_of(pages, place);
        if (place == block + at)
            continue;
        if (keys)
            copy_key(pages->keys + page + key_at(place % PAGE, dim), COLUMNS * DEPTH, room + key_at(at, dim),
                     COLUMNS * DEPTH, dim);
        else
            copy_value(pages->values + page + value_at(place % PAGE, dim), DEPTH, room + value_at(at, dim), DEPTH, dim);
    }
    return room;
}

/* Scores of `rows` queries with the keys [block, block + COLUMNS), from a panel -> scores [rows, scores_apart]. */
static void score(const Group *group, const operand *queries, const element *panel, int64_t block, float *scores,
                  int64_t rows) {
    const int64_t dim = group->shape->dim;
    floats sums[BLOCK][2];
    const element *soon = values_at(&group->pages, block, dim);
    const Rows from = {queries, dim, dim, panel, COLUMNS * DEPTH, soon, COLUMNS * DEPTH, {0}};
    add_block(&from, sums, false, true, rows);
    for (int64_t row = 0; row < rows; row++, scores += scores_apart(group->shape))
        for (int half = 0; half < 2; half++) {
            const floats scaled = sums[row][half] * group->shape->scale;
            memcpy(scores + half * LANES, &scaled, sizeof scaled);
        }
}

/* sums [rows, halves] += weights [rows, scores_apart as floats] of `count` keys times COLUMNS dims of their values. soon:
 * what is to be fetched meanwhile. */
static void mix(const Group *group, const operand *weights, int64_t count, const element *values, const element *soon,
                floats (*sums)[2], int64_t rows) {
    const int64_t apart = scores_apart(group->shape) * (int64_t)(sizeof(float) / sizeof(operand));
    const Rows from = {weights, apart, count, values, group->shape->dim * DEPTH, soon, COLUMNS * DEPTH, {0}};
    add_block(&from, sums, false, false, rows);
}

/* The first `count` of GRAIN values; zeros for the others, which may be not finite, and then so is 0 times them. */
INLINE const element *first_values(const Group *group, const element *values, int64_t count) {
    const int64_t line = group->shape->dim * DEPTH, whole = count / DEPTH * line;
    element *last = group->room.last;
    memcpy(last, values, whole * sizeof *last);
    memset(last + whole, 0, (GRAIN / DEPTH * line - whole) * sizeof *last);
    if (count % DEPTH)
        for (int64_t i = 0; i < line; i += DEPTH)
            last[whole + i] = values[whole + i];
    return last;
}

/* out = attention of the group's tokens. Where keys of a path lie elsewhere than at their positions, their panel
 * is put together; those that all tokens see are read for all at once. Of a token that does not see all keys before it
 * there is no other in the group. */
static void attend_group(const Group *group) {
    const Shape *shape = group->shape;
    const Path *paths = group->paths;
    const int64_t dim = shape->dim, heads = group->heads, tokens = group->tokens, rows = tokens * heads;
    const int64_t parts = (dim + COLUMNS - 1) / COLUMNS, apart = scores_apart(shape);
    const int64_t visible = shape->window && shape->window < paths->last ? paths->last - shape->window : 0;
    const int64_t first = visible / COLUMNS * COLUMNS;
    operand *queries = group->room.queries;
    float *scores = group->room.scores, totals[BLOCK];
    int64_t common = INT64_MAX; /* keys before it all see, at their positions */
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t straight = paths[token].start < paths[token].last ? paths[token].start : paths[token].last;
        common = straight / COLUMNS * COLUMNS < common ? straight / COLUMNS * COLUMNS : common;
        copy_operands(group->q + token * group->stride, queries + token * heads * dim, heads * dim);
    }
    common = common < first ? first : common;
    begin_blocks(rows, 1, false);
    for (int64_t block = first; block < common; block += COLUMNS)
        score(group, queries, keys_at(&group->pages, block, dim), block, scores + block - first, rows);

    floats sums[parts][BLOCK][2];
    for (int64_t part = 0; part < parts; part++)
        memset(sums[part], 0, rows * sizeof *sums[part]);
    for (int64_t token = 0; token < tokens; token++) {
        const Path *path = paths + token;
        float *own = scores + token * heads * apart;
        begin_blocks(heads, 1, false);
        for (int64_t block = common; block < path->last; block += COLUMNS)
            score(group, queries + token * heads * dim, along(group, path, block, true), block, own + block - first, heads);
        for (int64_t head = 0; head < heads; head++) {
            totals[token * heads + head] = weigh(own + head * apart, first, visible, path->last, shape->softcap);
            narrow(own + head * apart, fill_up(path->last - first));
        }
    }
    if (common > first)
        begin_blocks(rows, 1, false);
    for (int64_t block = first, count; block < common; block += count) { /* a page's at a time */
        count = PAGE - block % PAGE < common - block ? PAGE - block % PAGE : common - block;
        const element *values = values_at(&group->pages, block, dim), *soon = keys_at(&group->next, block, dim);
        for (int64_t part = 0; part < parts; part++, soon += count * COLUMNS)
            mix(group, (operand *)scores + block - first, count, values + part * COLUMNS * DEPTH, soon, sums[part], rows);
    }
    for (int64_t token = 0; token < tokens; token++) {
        const Path *path = paths + token;
        const int64_t row = token * heads;
        begin_blocks(heads, 1, false);
        const operand *weights = (const operand *)(scores + row * apart) + common - first;
        for (int64_t block = common; block < path->last; block += COLUMNS, weights += COLUMNS) {
            const int64_t count = block + COLUMNS < path->last ? COLUMNS : path->last - block;
            const int64_t whole = count / GRAIN * GRAIN;
            const element *values = along(group, path, block, false), *soon = keys_at(&group->next, block, dim);
            if (whole)
                for (int64_t part = 0; part < parts; part++, soon += whole * COLUMNS)
                    mix(group, weights, whole, values + part * COLUMNS * DEPTH, soon, sums[part] + row, heads);
            if (whole < count) {
                const element *last = first_values(group, values + whole * dim, count - whole);
                for (int64_t part = 0; part < parts; part++, soon += GRAIN * COLUMNS)
                    mix(group, weights + whole, GRAIN, last + part * COLUMNS * DEPTH, soon, sums[part] + row, heads);
            }
        }
        for (int64_t head = 0; head < heads; head++)
            for (int64_t i = 0; i < dim; i += LANES)
                store(group->out + token * group->width + head * dim + i,
                      sums[i / COLUMNS][row + head][i / LANES % 2] / totals[row + head]);
    }
}

#endif
