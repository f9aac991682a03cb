/* Mixtures of experts: each token goes through a few of a layer's feed-forwards, as a router says.
 *
 * Pairs of a token and one of its experts are sorted by expert, so that each expert's weights are read once. What the
 * experts say of a token is added up in the order in which the router ranks them: so it depends on no other token.
 *
 * Shapes: N tokens, E experts, K that a token goes to, P = N * K pairs, d hidden, f feed-forward. */
#ifndef EXPERTS_H
#define EXPERTS_H

#include <float.h>

#include "product.h"

/* See Router in spec.py. correction [E] or NULL. gated: behind a token's logits comes the one of the shared expert's gate. */
typedef struct {
    const float *correction;
    int64_t experts, top_k, groups, top_groups, sigmoid, normalised, gated;
    float scale;
} Router;

/* See Experts in spec.py. up, down [E]. alpha, limit: see gate_one. */
typedef struct {
    Router router;
    Product scores;
    const Product *up, *down;
    float alpha, limit;
} Experts;

#define LEAST_SUM 1e-20f /* added to weights' sum, which may be zero */

INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* What may be ranked: more than -infinity, and not NaN. */
INLINE float rankable(float x) { return x > -FLT_MAX ? x : -FLT_MAX; }

/* The first of the highest values, which becomes -infinity. */
static int64_t take_highest(float *values, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
        if (values[i] > values[best])
            best = i;
    values[best] = -INFINITY;
    return best;
}

/* Close all groups of experts to the choice but those whose two highest sum up to the most. */
static void close_groups(const Router *router, float *ranked) {
    const int64_t size = router->experts / router->groups;
    float sums[router->groups];
    for (int64_t group = 0; group < router->groups; group++) {
        float highest = -INFINITY, second = -INFINITY;
        for (int64_t expert = group * size; expert < (group + 1) * size; expert++) {
            second = fmaxf(second, fminf(highest, ranked[expert]));
            highest = fmaxf(highest, ranked[expert]);
        }
        sums[group] = rankable(highest + second);
    }
    for (int64_t rank = 0; rank < router->top_groups; rank++)
        take_highest(sums, router->groups);
    for (int64_t expert = 0; expert < router->experts; expert++)
        if (sums[expert / size] != -INFINITY)
            ranked[expert] = -FLT_MAX;
}

/* The experts [rows, K] that tokens with these logits [rows, E (+ 1)] go to, K different ones, and weights [rows, K (+ 1)]:
 * theirs, and behind them that of the shared expert. */
void rayskip_route(const Router *router, const float *logits, int64_t rows, int64_t *chosen, float *weights) {
    const int64_t experts = router->experts, top_k = router->top_k;
    float scores[experts], ranked[experts];
    for (int64_t row = 0; row < rows; row++) {
        float largest = -INFINITY, total = 0, sum = 0;
        for (int64_t i = 0; i < experts; i++)
            largest = fmaxf(largest, logits[i]);
        for (int64_t i = 0; i < experts; i++) {
            scores[i] = router->sigmoid ? sigmoid(logits[i]) : expf(logits[i] - largest);
            total += scores[i];
        }
        for (int64_t i = 0; i < experts; i++) {
            if (!router->sigmoid)
                scores[i] /= total;
            ranked[i] = rankable(router->correction ? scores[i] + router->correction[i] : scores[i]);
        }
        if (router->top_groups < router->groups)
            close_groups(router, ranked);
        for (int64_t rank = 0; rank < top_k; rank++) {
            chosen[rank] = take_highest(ranked, experts);
            weights[rank] = scores[chosen[rank]];
            sum += weights[rank];
        }
        for (int64_t rank = 0; rank < top_k; rank++)
            weights[rank] = (router->normalised ? weights[rank] / (sum + LEAST_SUM) : weights[rank]) * router->scale;
        if (router->gated)
            weights[top_k] = sigmoid(logits[experts]);
        logits += experts + router->gated;
        chosen += top_k;
        weights += top_k + router->gated;
    }
}

/* Sort the pairs by expert: those of expert e are [begins[e], begins[e + 1]). chosen [P]: experts; becomes each pair's place.
 * tokens_of [P]: the token of the pair at a place. */
static void sort_pairs(const Router *router, int64_t tokens, int64_t *chosen, int64_t *begins, int64_t *tokens_of) {
    const int64_t pairs = tokens * router->top_k;
    memset(begins, 0, (router->experts + 1) * sizeof *begins);
    for (int64_t pair = 0; pair < pairs; pair++)
        begins[chosen[pair] + 1]++;
    for (int64_t expert = 0; expert < router->experts; expert++)
        begins[expert + 1] += begins[expert];
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t place = begins[chosen[pair]]++; /* which moves to where the next expert's begin */
        chosen[pair] = place;
        tokens_of[place] = pair / router->top_k;
    }
    memmove(begins + 1, begins, router->experts * sizeof *begins);
    begins[0] = 0;
}

/* A worker's part of each expert's product over its own pairs: x [P, in] -> out [P, out], `stride` and `out_stride` elements
 * from one pair to the next. Workers divide the panels of all experts, so that all have as many blocks of rows times
 * panels. workspace: the worker's own, operand_bytes(N * in). */
static void multiply_experts(const Product *products, int64_t experts, const int64_t *begins, const element *x, int64_t stride,
                             element *out, int64_t out_stride, operand *workspace, ThreadPool *pool, int worker) {
    const int64_t panels = (products->out + COLUMNS - 1) / COLUMNS;
    int64_t total = 0, before = 0;
    for (int64_t expert = 0; expert < experts; expert++)
        total += blocks_of(begins[expert + 1] - begins[expert]) * panels;
    const int64_t first = chunk_begin(total, pool, worker), last = chunk_begin(total, pool, worker + 1);
    for (int64_t expert = 0; expert < experts; expert++) {
        const int64_t row = begins[expert], rows = begins[expert + 1] - row, blocks = blocks_of(rows);
        if (blocks && before < last && before + blocks * panels > first) {
            const int64_t from = first > before ? (first - before + blocks - 1) / blocks : 0;
            const int64_t to = (last - before + blocks - 1) / blocks;
            multiply_panels(products + expert, from, to < panels ? to : panels, x + row * stride, stride, rows, workspace,
                            (Outputs){.out = out + row * out_stride, .stride = out_stride});
        }
        before += blocks * panels;
    }
}

/* x [N, d] = the shared expert's part, which it is, times its weight, and the experts' [P, d] times theirs, of tokens [first,
 * last). shared: whether there is one. places [P]: see sort_pairs. stride: elements from one token, or pair, to the next. */
static void sum_pairs(const Router *router, const element *of_pairs, const int64_t *places, const float *weights, bool shared,
                      element *x, int64_t first, int64_t last, int64_t width, int64_t stride) {
    const int64_t top_k = router->top_k;
    for (int64_t token = first; token < last; token++) {
        const float *own = weights + token * (top_k + router->gated);
        element *to = x + token * stride;
        for (int64_t i = 0; i < width; i += LANES) {
            floats total = {0};
            if (shared)
                total += load(to + i) * (router->gated ? own[top_k] : 1.0f);
            for (int64_t rank = 0; rank < top_k; rank++)
                total += load(of_pairs + places[token * top_k + rank] * stride + i) * own[rank];
            store(to + i, total);
        }
    }
}

#endif
