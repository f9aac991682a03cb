/* CPU kernels of the forward. library.py calls the functions `rayskip_...`, by names without that prefix.
 *
 * Each row of each function is computed alone, in an order that nothing but the row decides, so results never depend on
 * batch mates. Sums run in float32; results are rounded once.
 *
 * Compiled per element type: with -DBF16 elements are bfloat16, else float32. Vectors are the compiler's own (GCC and
 * Clang), so the same source serves AVX-512, AVX2 and NEON; where it counts there are intrinsics.
 *
 * In the order to read: vectors.h, operands.h, panels.h, blocks.h, outputs.h, thread_pool.h, product.h (matrix products),
 * experts.h, heads.h, attention.h, and this file. The other headers each make one thing faster and begin by saying that they may be
 * skipped.
 *
 * Shapes: N tokens, d hidden, f feed-forward, H query heads, K key-value heads, G = H / K, D head dim, T key positions
 * read. */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "attention.h"
#include "vectors.h"

/* Bytes, rounded up to whole cache lines. */
static int64_t to_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* x [rows, width] += branch (NULL: nothing), rounded; out = RMSNorm(x) * weight. width: a multiple of LANES. stride:
 * elements from one row to the next, of branch and out. */
void rayskip_add_rms_norm(element *x, const element *branch, const element *weight, element *out, int64_t rows,
                          int64_t width, int64_t stride, float eps) {
    for (int64_t row = 0; row < rows; row++, x += width, out += stride) {
        floats squares = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            if (branch)
                store(x + i, load(x + i) + load(branch + row * stride + i));
            floats value = load(x + i);
            squares += value * value;
        }
        float scale = 1.0f / sqrtf(reduce_sum(squares) / (float)width + eps);
        for (int64_t i = 0; i < width; i += LANES)
            store(out + i, load(x + i) * scale * load(weight + i));
    }
}

/* silu(gate) * up, if `limit` is 0; else (up + 1) * gate * sigmoid(alpha * gate), gate clamped to at most `limit` and up to
 * at least -limit too. */
INLINE floats gate_one(floats gate, floats up, float alpha, float limit) {
    if (limit == 0)
        return gate / (1.0f + vector_exp(-gate)) * up;
    gate = blend(gate > limit, broadcast(limit), gate);
    up = blend(up > limit, broadcast(limit), blend(up < -limit, broadcast(-limit), up));
    return gate / (1.0f + vector_exp(-alpha * gate)) * (up + 1.0f);
}

/* out [rows, width] = what gate_one makes of up[:, :width] and up[:, width:]. width: a multiple of LANES. stride: elements
 * from one row to the next, of up and out. */
void rayskip_gate(const element *up, element *out, int64_t rows, int64_t width, const int64_t stride[2], float alpha,
                  float limit) {
    for (int64_t row = 0; row < rows; row++, up += stride[0], out += stride[1])
        for (int64_t i = 0; i < width; i += LANES)
            store(out + i, gate_one(load(up + i), load(up + width + i), alpha, limit));
}

/* The top k of each row's logits [rows, width], the largest first and of equals the first: their indices and probabilities,
 * both [rows, k]. width: a multiple of LANES, and no less than k. */
void rayskip_top_k(const element *logits, int64_t rows, int64_t width, int64_t k, int64_t *indices,
                       float *probabilities) {
    for (int64_t row = 0; row < rows; row++, logits += width, indices += k, probabilities += k) {
        float *top = probabilities; /* logits at first */
        for (int64_t rank = 0; rank < k; rank++)
            top[rank] = -INFINITY;
        for (int64_t i = 0; i < width; i += LANES) {
            const floats some = load(logits + i);
            if (!(reduce_max(some) > top[k - 1]))
                continue;
            for (int lane = 0; lane < LANES; lane++) {
                int64_t rank = k;
                for (; rank && some[lane] > top[rank - 1]; rank--)
                    if (rank < k) {
                        top[rank] = top[rank - 1];
                        indices[rank] = indices[rank - 1];
                    }
                if (rank < k) {
                    top[rank] = some[lane];
                    indices[rank] = i + lane;
                }
            }
        }
        const float largest = top[0];
        floats totals = {0};
        for (int64_t i = 0; i < width; i += LANES)
            totals += vector_exp(load(logits + i) - largest);
        const float total = reduce_sum(totals);
        for (int64_t rank = 0; rank < k; rank++)
            probabilities[rank] = expf(top[rank] - largest) / total;
    }
}

/* The argmax of each row's logits [rows, width], the first of equals, and its value: NaN where any logit is NaN. */
void rayskip_argmax(const element *logits, int64_t rows, int64_t width, int64_t *indices, float *values) {
    const int64_t size = 16 * LANES; /* of a block: only the one with the largest logit is searched element by element */
    for (int64_t row = 0; row < rows; row++, logits += width) {
        float largest = -INFINITY;
        int64_t index = 0;
        bool any_nan = false;
        for (int64_t begin = 0; begin < width; begin += size) {
            const int64_t end = begin + size < width ? begin + size : width;
            floats highest = broadcast(-INFINITY);
            ints nans = {0};
            int64_t i = begin;
            for (; i + LANES <= end; i += LANES) {
                const floats some = load(logits + i);
                nans |= some != some;
                highest = vector_max(some, highest);
            }
            float here = reduce_max(highest);
            for (; i < end; i++) {
                any_nan |= load_one(logits[i]) != load_one(logits[i]);
                here = fmaxf(here, load_one(logits[i]));
            }
            for (int lane = 0; lane < LANES; lane++)
                any_nan |= nans[lane] != 0;
            if (here > largest) {
                largest = here;
                index = begin;
            }
        }
        while (index + 1 < width && load_one(logits[index]) != largest)
            index++;
        indices[row] = index;
        values[row] = any_nan ? NAN : largest;
    }
}

/* Rotary embedding of q [N, H, D] and k [N, K, D], in place; k and v [N, K, D] are stored in the cache, at the step's
 * places. stride: elements from one token to the next, of q, k and v. See rotate_tokens and Stored. */
void rayskip_rotate_and_store(const Shape *shape, element *q, element *k, const element *v, const int64_t stride[3],
                              const element *cosines, const element *sines, int64_t rotary_dims, const Step *step,
                              element *keys, element *values, const int32_t *table, int64_t tokens) {
    const Stored stored = {keys, values, table, k, v, {stride[1], stride[2]}};
    rotate_tokens(shape, q, k, stride, cosines, sines, rotary_dims, step, 0, tokens);
    store_tokens(shape, step, &stored, 0, tokens);
}

/* Attention of all heads of all tokens: see attend_items. Returns 0, or 1 when memory is out. */
int rayskip_attend(const Shape *of, const Step *step, const element *q, int64_t stride, element *keys,
                   element *values, const int32_t *table, element *out, int64_t tokens) {
    const Shape whole = shape_for(*of, step, tokens), *shape = &whole;
    char *workspace = aligned_alloc(64, to_lines(workspace_bytes(shape)));
    if (!workspace)
        return 1;
    const Outputs to = {.out = out, .stride = shape->heads * shape->dim};
    const Stored stored = {.keys = keys, .values = values, .table = table};
    attend_items(shape, step, q, stride, &stored, false, workspace_at(shape, workspace), to, tokens, 0, 1);
    free(workspace);
    return 0;
}

/* Whether the system lets this process use what the kernels were compiled for. To be called before anything else. */
int rayskip_usable(void) {
#ifdef TILES
    return may_use_tiles();
#else
    return 1;
#endif
}

/* The layout of weights, keys and values. */
int64_t rayskip_panel_columns(void) { return COLUMNS; }
int64_t rayskip_panel_depth(void) { return DEPTH; }
int64_t rayskip_page_positions(void) { return PAGE; }

#ifndef PRODUCTS
int rayskip_has_products(void) { return 0; }
#else
#include "bounded_argmax.h"
#include "compression.h"
#include "experts.h"

int rayskip_has_products(void) { return 1; }

/* Products of up to so many rows read compressed weights; 0: none does. */
int64_t rayskip_compressed_rows(void) { return COMPRESSED_ROWS; }

/* out, argmax [threads, rows], unrounded: see Outputs; one of them is not NULL. workspace: each worker's operands. */
typedef struct {
    const Product *product;
    const element *x;
    int64_t rows;
    element *out;
    Argmax *argmax;
    float *unrounded;
    char *workspace;
} ProductTask;

static void product_worker(void *argument, ThreadPool *pool, int worker) {
    const ProductTask *task = argument;
    const Product *product = task->product;
    char *workspace = task->workspace + worker * to_lines(operand_bytes(task->rows * product->in));
    const Outputs to = {task->out, product->out, task->argmax ? task->argmax + worker * task->rows : NULL,
                        task->unrounded};
    multiply_chunk(product, task->x, product->in, task->rows, to, (operand *)workspace, pool, worker);
}

/* Returns 0, or 1 when memory is out. */
static int run_product(ProductTask *task, int64_t threads) {
    task->workspace = aligned_alloc(64, 64 + threads * to_lines(operand_bytes(task->rows * task->product->in)));
    const int failed = !task->workspace || parallel_for((int)threads, product_worker, task);
    free(task->workspace);
    return failed;
}

/* x [rows, in] -> out [rows, out]. Returns 0, or 1 when memory is out. */
int rayskip_product(const Product *product, const element *x, element *out, int64_t rows, int64_t threads) {
    ProductTask task = {product, x, rows, .out = out};
    return run_product(&task, threads);
}

/* The same, in floats. */
int rayskip_unrounded_product(const Product *product, const element *x, float *out, int64_t rows, int64_t threads) {
    ProductTask task = {product, x, rows, .unrounded = out};
    return run_product(&task, threads);
}

/* For reduce_argmax; NULL when memory is out. */
static Argmax *new_argmax(int64_t workers, int64_t rows) {
    Argmax *argmax = aligned_alloc(64, 64 + workers * rows * sizeof *argmax);
    for (int64_t i = 0; argmax && i < workers * rows; i++)
        init_argmax(argmax + i);
    return argmax;
}

/* The argmax of each row's outputs of a product of finite weights, x [rows, in], and its value, without storing the
 * outputs. A row whose outputs may not be finite has index -1. Returns 0, or 1 when memory is out. */
int rayskip_product_argmax(const Product *product, const element *x, int64_t rows, int64_t threads, float *values,
                         int64_t *indices) {
    ProductTask task = {product, x, rows, .argmax = new_argmax(threads, rows)};
    const int failed = !task.argmax || run_product(&task, threads);
    if (!failed)
        reduce_argmax(task.argmax, threads, rows, values, indices);
    for (int64_t row = 0; row < rows; row++) {
        bool broken = false;
        for (int64_t i = row * product->in; i < (row + 1) * product->in; i++)
            broken |= !(fabsf(load_one(x[i])) < LIMIT);
        if (broken)
            indices[row] = -1;
    }
    free(task.argmax);
    return failed;
}

/* The int8 product of x [rows, in] -> out [rows, out]. Returns 0, or 1 when memory is out. */
int rayskip_int8_product(const Int8Weights *weights, const element *x, element *out, int64_t rows, int64_t threads) {
    QuantizedRow *info = malloc(rows * sizeof *info + 1);
    int16_t *quantized = malloc(rows * rayskip_int8_width(weights->in) * sizeof *quantized + 1);
    int failed = 1;
    if (info && quantized) {
        quantize_rows(x, quantized, info, rows, weights->in);
        Int8Task task = {weights, quantized, info, out, rows};
        failed = parallel_for((int)threads, int8_product_worker, &task);
    }
    free(info);
    free(quantized);
    return failed;
}

/* Up to so many rows rayskip_bounded_argmax takes less time than rayskip_product_argmax. */
int64_t rayskip_bounded_rows(int beside) { return beside ? BOUNDED_ROWS_BESIDE : BOUNDED_ROWS; }

/* As rayskip_product_argmax of the exact product, which has no bias, by bounded_argmax.h. weights: the same in int8. */
int rayskip_bounded_argmax(const Int8Weights *weights, const Product *exact, const element *x, int64_t rows, int64_t threads,
                   float *values, int64_t *indices) {
    const int64_t size = rows * exact->in, panels = (exact->out + COLUMNS - 1) / COLUMNS;
    QuantizedRow *info = malloc(rows * sizeof *info + 1);
    int16_t *quantized = malloc(rows * rayskip_int8_width(weights->in) * sizeof *quantized + 1);
    char *workspace = aligned_alloc(64, 64 + to_lines(operand_bytes(size)));
    float *bounds = malloc((panels + threads) * rows * sizeof *bounds + 1);
    Argmax *argmax = new_argmax(threads, rows);
    int failed = 1;
    if (info && quantized && workspace && bounds && argmax) {
        int64_t stride = exact->in;
        const operand *own = operands(x, &stride, (operand *)workspace, rows, exact->in);
        quantize_rows(x, quantized, info, rows, exact->in);
        BoundedArgmaxTask task = {weights, exact, quantized, info, own, rows, bounds, bounds + panels * rows, argmax};
        failed = parallel_for((int)threads, bounded_argmax_worker, &task);
        reduce_argmax(argmax, threads, rows, values, indices);
    }
    free(info);
    free(quantized);
    free(workspace);
    free(bounds);
    free(argmax);
    return failed;
}

/* One decoder layer: see Layer in spec.py. `up` and `down`: of its feed-forward or its shared expert; empty where it has
 * none. experts: NULL where it has none. q_norm [q_width], k_norm [k_width]: of one head or of all; NULL where the layer has
 * none. cosines, sines: see rotate_tokens. sinks: see Shape. */
typedef struct {
    Product qkv, out, up, down;
    const Experts *experts;
    const element *attn_norm, *mlp_norm, *q_norm, *k_norm, *cosines, *sines;
    const float *sinks;
    int64_t q_width, k_width, rotary_dims, window;
    float attn_eps, mlp_eps, head_eps, alpha, limit;
} Layer;

/* Layers [first, last) over N tokens, x [N, d], in place. active [layers]: a layer runs its first so many tokens (NULL:
 * all). keys, values, table [layers, rows, blocks]: see Stored. */
typedef struct {
    const Layer *layers;
    int64_t first, last;
    Shape shape;
    Step step;
    element *keys, *values;
    const int32_t *table;
    int64_t table_size; /* entries of one layer */
    element *x;
    int64_t tokens;
    const int64_t *active;
    int64_t threads;
    /* scratch, filled in here. Tokens at the steps of a layer, with padded strides: */
    element *normed, *qkv, *attended, *branch;
    element *up, *gated;         /* of pairs of a token and an expert, too */
    element *of_pairs;           /* experts' inputs, then their outputs */
    float *logits, *weights;     /* of experts: see rayskip_route */
    int64_t *chosen, *tokens_of; /* see sort_pairs */
    int64_t *begins;
    char *workspaces; /* for each worker's attention */
    char *operands;   /* for each worker's products: as many bytes as the widest needs */
    int64_t operands_size;
} LayersTask;

/* RMSNorm of q and k, head by head or all heads at once, of tokens [first, last). */
static void normalise_heads(const Shape *shape, const Layer *layer, element *qkv, int64_t stride, int64_t first,
                            int64_t last) {
    if (!layer->q_norm)
        return;
    for (element *row = qkv + first * stride; row < qkv + last * stride; row += stride) {
        element *keys = row + shape->heads * shape->dim;
        const int64_t q = shape->heads * shape->dim / layer->q_width, k = shape->kv_heads * shape->dim / layer->k_width;
        rayskip_add_rms_norm(row, NULL, layer->q_norm, row, q, layer->q_width, layer->q_width, layer->head_eps);
        rayskip_add_rms_norm(keys, NULL, layer->k_norm, keys, k, layer->k_width, layer->k_width, layer->head_eps);
    }
}

/* The worker's part of x [tokens, width] += branch. */
static void add_chunk(element *x, const element *branch, int64_t tokens, int64_t width, ThreadPool *pool, int worker) {
    for (int64_t token = chunk_begin(tokens, pool, worker); token < chunk_begin(tokens, pool, worker + 1); token++)
        for (int64_t i = 0; i < width; i += LANES) {
            element *to = x + token * width + i;
            store(to, load(to) + load(branch + token * padded_stride(width) + i));
        }
}

/* One worker's part of what a layer's experts say of `tokens` tokens, whose branch is the shared expert's part, if there is
 * one. See layers_worker. */
static void experts_worker(const LayersTask *task, const Layer *layer, int64_t tokens, operand *own, ThreadPool *pool,
                           int worker) {
    const Experts *experts = layer->experts;
    const Router *router = &experts->router;
    const int64_t width = experts->scores.in, stride = padded_stride(width), inner = experts->down->in;
    const int64_t up_stride = padded_stride(2 * inner), gate_stride[2] = {up_stride, padded_stride(inner)};
    const int64_t from = chunk_begin(tokens, pool, worker), to = chunk_begin(tokens, pool, worker + 1);
    const int64_t pairs = tokens * router->top_k;
    const int64_t first = chunk_begin(pairs, pool, worker), last = chunk_begin(pairs, pool, worker + 1);
    multiply_chunk(&experts->scores, task->normed, stride, tokens,
                   (Outputs){.unrounded = task->logits, .stride = experts->scores.out}, own, pool, worker);
    barrier(pool);
    rayskip_route(router, task->logits + from * experts->scores.out, to - from, task->chosen + from * router->top_k,
                  task->weights + from * (router->top_k + router->gated));
    barrier(pool);
    if (!worker)
        sort_pairs(router, tokens, task->chosen, task->begins, task->tokens_of);
    barrier(pool);
    for (int64_t pair = first; pair < last; pair++)
        memcpy(task->of_pairs + pair * stride, task->normed + task->tokens_of[pair] * stride, width * sizeof(element));
    barrier(pool);
    multiply_experts(experts->up, router->experts, task->begins, task->of_pairs, stride, task->up, up_stride, own, pool, worker);
    barrier(pool);
    rayskip_gate(task->up + first * up_stride, task->gated + first * gate_stride[1], last - first, inner, gate_stride,
                 experts->alpha, experts->limit);
    barrier(pool);
    multiply_experts(experts->down, router->experts, task->begins, task->gated, gate_stride[1], task->of_pairs, stride, own,
                     pool, worker);
    barrier(pool);
    sum_pairs(router, task->of_pairs, task->chosen, task->weights, layer->down.in != 0, task->branch, from, to, width, stride);
}

/* One worker's part of the layers. Workers divide tokens, panels or heads, and wait for each other where one reads what
 * another wrote. */
static void layers_worker(void *argument, ThreadPool *pool, int worker) {
    const LayersTask *task = argument;
    const int64_t width = task->layers->qkv.in, stride = padded_stride(width);
    const int64_t qkv_stride = padded_stride(task->layers->qkv.out), qk_stride[2] = {qkv_stride, qkv_stride};
    const int64_t heads = task->shape.heads * task->shape.dim, kv_heads = task->shape.kv_heads * task->shape.dim;
    const bool late = may_store_late(&task->step, task->tokens, pool);
    const Outputs qkv = {.out = task->qkv, .stride = qkv_stride};
    const Outputs attended = {.out = task->attended, .stride = padded_stride(heads)};
    const Outputs added = {.out = task->branch, .stride = stride};
    const Workspace workspace =
        workspace_at(&task->shape, task->workspaces + worker * to_lines(workspace_bytes(&task->shape)));
    operand *own = (operand *)(task->operands + worker * task->operands_size);
    int64_t pending = 0; /* tokens to which the last layer's branch is still to be added */
    for (int64_t index = task->first; index < task->last; index++) {
        const Layer *layer = task->layers + index;
        const int64_t tokens = task->active ? task->active[index] : task->tokens;
        const int64_t from = chunk_begin(tokens, pool, worker), to = chunk_begin(tokens, pool, worker + 1);
        if (!tokens)
            continue;
        if (pending && pending != tokens) { /* other chunks of tokens than below */
            add_chunk(task->x, task->branch, pending, width, pool, worker);
            pending = 0;
            barrier(pool);
        }
        Shape shape = task->shape;
        shape.window = layer->window;
        shape.sinks = layer->sinks;
        const Stored stored = {task->keys, task->values, task->table + index * task->table_size, task->qkv + heads,
                               task->qkv + heads + kv_heads, {qkv_stride, qkv_stride}};
        element *x = task->x + from * width, *normed = task->normed + from * stride;
        element *branch = task->branch + from * stride;
        rayskip_add_rms_norm(x, pending ? branch : NULL, layer->attn_norm, normed, to - from, width, stride,
                             layer->attn_eps);
        barrier(pool);
        multiply_chunk(&layer->qkv, task->normed, stride, tokens, qkv, own, pool, worker);
        barrier(pool);
        normalise_heads(&shape, layer, task->qkv, qkv_stride, from, to);
        rotate_tokens(&shape, task->qkv, task->qkv + heads, qk_stride, layer->cosines, layer->sines,
                      layer->rotary_dims, &task->step, from, to);
        if (!late)
            store_tokens(&shape, &task->step, &stored, from, to);
        barrier(pool);
        attend_items(&shape, &task->step, task->qkv, qkv_stride, &stored, late, workspace, attended, tokens, worker,
                     pool->count);
        barrier(pool);
        multiply_chunk(&layer->out, task->attended, attended.stride, tokens, added, own, pool, worker);
        barrier(pool);
        pending = tokens;
        const int64_t inner = layer->down.in, gate_stride[2] = {padded_stride(2 * inner), padded_stride(inner)};
        if (!layer->mlp_norm)
            continue;
        rayskip_add_rms_norm(x, branch, layer->mlp_norm, normed, to - from, width, stride, layer->mlp_eps);
        barrier(pool);
        if (inner) {
            const Outputs up = {.out = task->up, .stride = gate_stride[0]};
            multiply_chunk(&layer->up, task->normed, stride, tokens, up, own, pool, worker);
            barrier(pool);
            rayskip_gate(task->up + from * gate_stride[0], task->gated + from * gate_stride[1], to - from, inner,
                         gate_stride, layer->alpha, layer->limit);
            barrier(pool);
            multiply_chunk(&layer->down, task->gated, gate_stride[1], tokens, added, own, pool, worker);
            barrier(pool);
        }
        if (layer->experts)
            experts_worker(task, layer, tokens, own, pool, worker);
    }
    add_chunk(task->x, task->branch, pending, width, pool, worker);
}

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Bytes of `rows` rows of elements, with padded strides. */
INLINE int64_t row_bytes(int64_t rows, int64_t width) { return rows * padded_stride(width) * (int64_t)sizeof(element); }

#define PARTS 12

/* Bytes [PARTS] of the scratch that a layer needs: see allocate_scratch. Returns the inputs of its widest product. */
static int64_t scratch_of(const Layer *layer, int64_t tokens, int64_t *bytes) {
    const Experts *experts = layer->experts;
    const int64_t top_k = experts ? experts->router.top_k : 0, inner = experts ? experts->down->in : 0, pairs = tokens * top_k;
    const int64_t logits = experts ? experts->scores.out : 0, width = layer->qkv.in;
    const int64_t own[PARTS] = {
        row_bytes(tokens, width),
        row_bytes(tokens, layer->qkv.out),
        row_bytes(tokens, layer->out.in),
        row_bytes(tokens, width),
        larger(row_bytes(tokens, layer->up.out), row_bytes(pairs, 2 * inner)),
        larger(row_bytes(tokens, layer->down.in), row_bytes(pairs, inner)),
        row_bytes(pairs, width),
        tokens * logits * (int64_t)sizeof(float),
        tokens * (top_k + 1) * (int64_t)sizeof(float),
        pairs * (int64_t)sizeof(int64_t),
        pairs * (int64_t)sizeof(int64_t),
        (logits + 1) * (int64_t)sizeof(int64_t),
    };
    memcpy(bytes, own, sizeof own);
    return larger(larger(width, layer->out.in), larger(layer->down.in, inner));
}

/* Allocate and fill in the task's scratch; returns what to free, or NULL when memory is out. */
static char *allocate_scratch(LayersTask *task) {
    task->shape = shape_for(task->shape, &task->step, task->tokens);
    int64_t most[PARTS] = {0}, widest = 0;
    for (const Layer *layer = task->layers + task->first; layer < task->layers + task->last; layer++) {
        int64_t bytes[PARTS];
        widest = larger(widest, scratch_of(layer, task->tokens, bytes));
        for (int i = 0; i < PARTS; i++)
            most[i] = larger(most[i], to_lines(bytes[i]));
    }
    task->operands_size = to_lines(operand_bytes(task->tokens * widest));
    const int64_t workspaces = task->threads * to_lines(workspace_bytes(&task->shape));
    int64_t size = workspaces + task->threads * task->operands_size;
    for (int i = 0; i < PARTS; i++)
        size += most[i];
    char *scratch = aligned_alloc(64, size);
    if (!scratch)
        return NULL;
    task->workspaces = scratch;
    task->operands = scratch + workspaces;
    char *at[PARTS + 1] = {task->operands + task->threads * task->operands_size};
    for (int i = 0; i < PARTS; i++)
        at[i + 1] = at[i] + most[i];
    task->normed = (element *)at[0];
    task->qkv = (element *)at[1];
    task->attended = (element *)at[2];
    task->branch = (element *)at[3];
    task->up = (element *)at[4];
    task->gated = (element *)at[5];
    task->of_pairs = (element *)at[6];
    task->logits = (float *)at[7];
    task->weights = (float *)at[8];
    task->chosen = (int64_t *)at[9];
    task->tokens_of = (int64_t *)at[10];
    task->begins = (int64_t *)at[11];
    return scratch;
}

/* Run the layers, in place. Returns 0, or 1 when memory is out. */
int rayskip_run_layers(LayersTask *task) {
    char *scratch = allocate_scratch(task);
    if (!scratch)
        return 1;
    const int failed = parallel_for((int)task->threads, layers_worker, task);
    free(scratch);
    return failed;
}

#include "draft.h"
#endif

/* Sizes of the structures that library.py declares too, in its order. */
const int64_t rayskip_sizes[] = {sizeof(Shape),  sizeof(Step),
#ifdef PRODUCTS
                                 sizeof(Product), sizeof(Int8Weights), sizeof(Router), sizeof(Experts),
                                 sizeof(Layer), sizeof(LayersTask), sizeof(DraftTask), sizeof(Compression)
#endif
};
