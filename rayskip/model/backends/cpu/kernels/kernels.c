/* CPU kernels of the forward. See library.py for the calls, by names without `rayskip_`.
 *
 * Each row of each function is computed alone, in an order that nothing but the row decides, so results never
 * depend on batch mates. Sums run in float32; results are rounded once.
 *
 * Compiled per element type: with -DBF16 elements are bfloat16, else float32. Vectors are the compiler's own
 * (GCC and Clang), so the same source serves AVX-512, AVX2 and NEON; where it counts there are intrinsics.
 *
 * Shapes: N tokens, d hidden, f feed-forward, H query heads, K key-value heads, G = H / K, D head dim, T key positions
 * read.
 */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "attention.h"
#include "vectors.h"

static int64_t to_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* x [rows, width] += branch (NULL: nothing), rounded; out = RMSNorm(x) * weight. width: a multiple of LANES. apart: elements
 * from one row to the next of branch and out. */
void rayskip_add_rms_norm(element *x, const element *branch, const element *weight, element *out, int64_t rows,
                          int64_t width, int64_t apart, float eps) {
    for (int64_t row = 0; row < rows; row++, x += width, out += apart) {
        floats squares = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            if (branch)
                store(x + i, load(x + i) + load(branch + row * apart + i));
            floats value = load(x + i);
            squares += value * value;
        }
        float scale = 1.0f / sqrtf(sum(squares) / (float)width + eps);
        for (int64_t i = 0; i < width; i += LANES)
            store(out + i, load(x + i) * scale * load(weight + i));
    }
}

/* out [rows, width] = silu(up[:, :width]) * up[:, width:]. width: a multiple of LANES. stride: elements from one row to the
 * next, of up and out. */
void rayskip_silu_gate(const element *up, element *out, int64_t rows, int64_t width, const int64_t stride[2]) {
    for (int64_t row = 0; row < rows; row++, up += stride[0], out += stride[1])
        for (int64_t i = 0; i < width; i += LANES) {
            floats gate = load(up + i);
            store(out + i, gate / (1.0f + exponential(-gate)) * load(up + width + i));
        }
}

/* The `count` likeliest of each row's logits [rows, width], the likeliest first and of equals the first: their places
 * and probabilities, both [rows, count]. width: a multiple of LANES, and no less than count. */
void rayskip_likeliest(const element *logits, int64_t rows, int64_t width, int64_t count, int64_t *places,
                       float *chances) {
    for (int64_t row = 0; row < rows; row++, logits += width, places += count, chances += count) {
        for (int64_t rank = 0; rank < count; rank++)
            chances[rank] = -INFINITY;
        for (int64_t i = 0; i < width; i += LANES) {
            const floats some = load(logits + i);
            if (!(maximum(some) > chances[count - 1]))
                continue;
            for (int lane = 0; lane < LANES; lane++) {
                int64_t rank = count;
                for (; rank && some[lane] > chances[rank - 1]; rank--)
                    if (rank < count) {
                        chances[rank] = chances[rank - 1];
                        places[rank] = places[rank - 1];
                    }
                if (rank < count) {
                    chances[rank] = some[lane];
                    places[rank] = i + lane;
                }
            }
        }
        const float most = chances[0];
        floats total = {0};
        for (int64_t i = 0; i < width; i += LANES)
            total += exponential(load(logits + i) - most);
        const float whole = sum(total);
        for (int64_t rank = 0; rank < count; rank++)
            chances[rank] = expf(chances[rank] - most) / whole;
    }
}

/* The highest of each row's logits [rows, width] (not a number where one is none) and the first place it stands at. */
void rayskip_highest(const element *logits, int64_t rows, int64_t width, int64_t *places, float *values) {
    const int64_t size = 16 * LANES; /* of a block: only the best one is walked element by element */
    for (int64_t row = 0; row < rows; row++, logits += width) {
        float most = -INFINITY;
        int64_t place = 0;
        bool broken = false;
        for (int64_t begin = 0; begin < width; begin += size) {
            const int64_t end = begin + size < width ? begin + size : width;
            floats best = splat(-INFINITY);
            ints none = {0};
            int64_t i = begin;
            for (; i + LANES <= end; i += LANES) {
                const floats some = load(logits + i);
                none |= some != some;
                best = larger(some, best);
            }
            float here = maximum(best);
            for (; i < end; i++) {
                broken |= load_one(logits[i]) != load_one(logits[i]);
                here = fmaxf(here, load_one(logits[i]));
            }
            for (int lane = 0; lane < LANES; lane++)
                broken |= none[lane] != 0;
            if (here > most) {
                most = here;
                place = begin;
            }
        }
        while (place + 1 < width && load_one(logits[place]) != most)
            place++;
        places[row] = place;
        values[row] = broken ? NAN : most;
    }
}

/* Turns q [N, H, D] in place; turns k [N, K, D] and stores it with v [N, K, D] in the cache, at the step's places. stride:
 * elements from one token to the next in q, k and v. See rotate_tokens and Stored. */
void rayskip_rotate_and_store(const Shape *shape, element *q, element *k, const element *v, const int64_t stride[3],
                              const element *cosines, const element *sines, int64_t turned, const Step *step,
                              element *keys, element *values, const int32_t *table, int64_t tokens) {
    const Stored stored = {keys, values, table, k, v, {stride[1], stride[2]}};
    rotate_tokens(shape, q, k, stride, cosines, sines, turned, step, 0, tokens);
    store_tokens(shape, step, &stored, 0, tokens);
}

/* Attention of all heads of all tokens, see attend_items. Returns 0, or 1 when memory is out. */
int rayskip_attend(const Shape *of, const Step *step, const element *q, int64_t stride, element *keys,
                   element *values, const int32_t *table, element *out, int64_t tokens) {
    const Shape whole = seen(*of, step, tokens), *shape = &whole;
    char *room = aligned_alloc(64, to_lines(room_bytes(shape)));
    if (!room)
        return 1;
    const Outputs to = {out, shape->heads * shape->dim, NULL};
    const Stored stored = {.keys = keys, .values = values, .table = table};
    attend_items(shape, step, q, stride, &stored, false, room_at(shape, room), to, tokens, 0, 1);
    free(room);
    return 0;
}

/* Whether the system lets this process use what the kernels were compiled for. To be asked before anything else. */
int rayskip_usable(void) {
#ifdef TILES
    return may_use_tiles();
#else
    return 1;
#endif
}

/* Of the panels of weights, keys and values. */
int64_t rayskip_panel_columns(void) { return COLUMNS; }
int64_t rayskip_panel_depth(void) { return DEPTH; }
int64_t rayskip_page_positions(void) { return PAGE; }

#ifndef PRODUCTS
int rayskip_has_products(void) { return 0; }
#else
#include "screen.h"

int rayskip_has_products(void) { return 1; }

/* Most rows of a product that reads packed weights; 0: none does. */
int64_t rayskip_packed_rows(void) { return FEW; }

/* best [threads, rows]: see Outputs; room: for the operands of each worker. */
typedef struct {
    const Product *product;
    const element *x;
    element *out;
    Best *best;
    int64_t rows;
    char *room;
} ProductTask;

static void work_on_product(void *argument, Team *team, int worker) {
    const ProductTask *task = argument;
    const Product *product = task->product;
    char *room = task->room + worker * to_lines(operand_bytes(task->rows * product->in));
    const Outputs to = {task->out, product->out, task->best ? task->best + worker * task->rows : NULL};
    multiply_share(product, task->x, product->in, task->rows, to, (operand *)room, team, worker);
}

/* Returns 0, or 1 when memory is out. */
static int run_product(ProductTask *task, int64_t threads) {
    task->room = aligned_alloc(64, 64 + threads * to_lines(operand_bytes(task->rows * task->product->in)));
    const int failed = !task->room || together((int)threads, work_on_product, task);
    free(task->room);
    return failed;
}

/* x [rows, in] -> out [rows, out]. Returns 0, or 1 when memory is out. */
int rayskip_product(const Product *product, const element *x, element *out, int64_t rows, int64_t threads) {
    ProductTask task = {product, x, out, NULL, rows, NULL};
    return run_product(&task, threads);
}

/* For best_of_all; NULL when memory is out. */
static Best *new_best(int64_t workers, int64_t rows) {
    Best *best = aligned_alloc(64, 64 + workers * rows * sizeof *best);
    for (int64_t i = 0; best && i < workers * rows; i++)
        begin_best(best + i);
    return best;
}

/* The highest of each row's outputs of a product of finite weights, x [rows, in], and the first place it stands at. A row
 * whose outputs may not be finite has place -1. Returns 0, or 1 when memory is out. */
int rayskip_best_outputs(const Product *product, const element *x, int64_t rows, int64_t threads, float *values,
                         int64_t *places) {
    ProductTask task = {product, x, NULL, new_best(threads, rows), rows, NULL};
    const int failed = !task.best || run_product(&task, threads);
    if (!failed)
        best_of_all(task.best, threads, rows, values, places);
    for (int64_t row = 0; row < rows; row++) {
        bool broken = false;
        for (int64_t i = row * product->in; i < (row + 1) * product->in; i++)
            broken |= !(fabsf(load_one(x[i])) < LIMIT);
        if (broken)
            places[row] = -1;
    }
    free(task.best);
    return failed;
}

/* x [rows, in] -> out [rows, out]. Returns 0, or 1 when memory is out. */
int rayskip_rough_product(const Rough *rough, const element *x, element *out, int64_t rows, int64_t threads) {
    RoughRow *each = malloc(rows * sizeof *each + 1);
    int16_t *whole = malloc(rows * rayskip_rough_width(rough->in) * sizeof *whole + 1);
    int failed = 1;
    if (each && whole) {
        round_rows(x, whole, each, rows, rough->in);
        RoughTask task = {rough, whole, each, out, rows};
        failed = together((int)threads, work_on_rough_product, &task);
    }
    free(each);
    free(whole);
    return failed;
}

/* Rows up to which the next function takes less time than `best_outputs`. */
int64_t rayskip_screened_rows(int beside) { return beside ? SCREENED_BESIDE : SCREENED; }

/* `best_outputs` of the exact product, which has no bias; rough: of the same weights. */
int rayskip_screen(const Rough *rough, const Product *exact, const element *x, int64_t rows, int64_t threads,
                   float *values, int64_t *places) {
    const int64_t size = rows * exact->in, panels = (exact->out + COLUMNS - 1) / COLUMNS;
    RoughRow *each = malloc(rows * sizeof *each + 1);
    int16_t *whole = malloc(rows * rayskip_rough_width(rough->in) * sizeof *whole + 1);
    char *room = aligned_alloc(64, 64 + to_lines(operand_bytes(size)));
    float *bounds = malloc((panels + threads) * rows * sizeof *bounds + 1);
    Best *best = new_best(threads, rows);
    int failed = 1;
    if (each && whole && room && bounds && best) {
        int64_t apart = exact->in;
        const operand *own = operands(x, &apart, (operand *)room, rows, exact->in);
        round_rows(x, whole, each, rows, exact->in);
        ScreenTask task = {rough, exact, whole, each, own, rows, bounds, bounds + panels * rows, best};
        failed = together((int)threads, work_on_screen, &task);
        best_of_all(best, threads, rows, values, places);
    }
    free(each);
    free(whole);
    free(room);
    free(bounds);
    free(best);
    return failed;
}

/* One layer: see Layer in spec.py. `up` and `down` are empty where no layer of a call has a feed-forward. q_norm, k_norm [D]:
 * NULL where it has none. cosines, sines: see rotate_tokens. */
typedef struct {
    Product qkv, out, up, down;
    const element *attn_norm, *mlp_norm, *q_norm, *k_norm, *cosines, *sines;
    int64_t turned, window;
    float attn_eps, mlp_eps, head_eps;
} Layer;

/* Layers [first, last) over N tokens: x [N, d], of which a layer runs the first `active` (NULL: all). keys, values, table
 * [layers, rows, blocks]: see Stored. */
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
    /* what a token is on its way through a layer, `spaced`: */
    element *normed, *qkv, *attended, *up, *gated, *branch;
    char *rooms; /* of each worker's attention */
    char *operands; /* of each worker's products */
} LayersTask;

/* For one worker's operands of the layers' widest product. */
static int64_t operands_room(const LayersTask *task) {
    const Layer *layer = task->layers;
    const int64_t outer = layer->qkv.in > layer->out.in ? layer->qkv.in : layer->out.in;
    return to_lines(operand_bytes(task->tokens * (layer->down.in > outer ? layer->down.in : outer)));
}

static void normalise_heads(const Shape *shape, const Layer *layer, element *qkv, int64_t stride, int64_t first,
                            int64_t last) {
    if (!layer->q_norm)
        return;
    for (element *row = qkv + first * stride; row < qkv + last * stride; row += stride) {
        element *keys = row + shape->heads * shape->dim;
        rayskip_add_rms_norm(row, NULL, layer->q_norm, row, shape->heads, shape->dim, shape->dim, layer->head_eps);
        rayskip_add_rms_norm(keys, NULL, layer->k_norm, keys, shape->kv_heads, shape->dim, shape->dim, layer->head_eps);
    }
}

/* The worker's part of x [tokens, width] += branch. */
static void add_share(element *x, const element *branch, int64_t tokens, int64_t width, Team *team, int worker) {
    for (int64_t token = share(tokens, team, worker); token < share(tokens, team, worker + 1); token++)
        for (int64_t i = 0; i < width; i += LANES) {
            element *to = x + token * width + i;
            store(to, load(to) + load(branch + token * spaced(width) + i));
        }
}

/* The worker's part of the layers. Tokens, panels and heads are shared out; workers meet where one reads what another
 * wrote. */
static void work_on_layers(void *argument, Team *team, int worker) {
    const LayersTask *task = argument;
    const int64_t width = task->layers->qkv.in, apart = spaced(width), packed = spaced(task->layers->qkv.out);
    const int64_t heads = task->shape.heads * task->shape.dim, kv_heads = task->shape.kv_heads * task->shape.dim;
    const int64_t stride[2] = {packed, packed};
    const bool late = may_store_late(&task->step, task->tokens, team);
    const int64_t inner = task->layers->down.in, gate_stride[2] = {spaced(2 * inner), spaced(inner)};
    const Outputs qkv = {task->qkv, packed, NULL}, attended = {task->attended, spaced(heads), NULL};
    const Outputs up = {task->up, gate_stride[0], NULL}, added = {task->branch, apart, NULL};
    const Room room = room_at(&task->shape, task->rooms + worker * to_lines(room_bytes(&task->shape)));
    operand *own = (operand *)(task->operands + worker * operands_room(task));
    int64_t pending = 0; /* tokens to which the last layer's branch is still to be added */
    for (int64_t index = task->first; index < task->last; index++) {
        const Layer *layer = task->layers + index;
        const int64_t tokens = task->active ? task->active[index] : task->tokens;
        const int64_t from = share(tokens, team, worker), to = share(tokens, team, worker + 1);
        if (!tokens)
            continue;
        if (pending && pending != tokens) { /* shared out otherwise than below */
            add_share(task->x, task->branch, pending, width, team, worker);
            pending = 0;
            meet(team);
        }
        Shape shape = task->shape;
        shape.window = layer->window;
        const Stored stored = {task->keys, task->values, task->table + index * task->table_size, task->qkv + heads,
                               task->qkv + heads + kv_heads, {packed, packed}};
        element *x = task->x + from * width, *normed = task->normed + from * apart;
        element *branch = task->branch + from * apart;
        rayskip_add_rms_norm(x, pending ? branch : NULL, layer->attn_norm, normed, to - from, width, apart,
                             layer->attn_eps);
        meet(team);
        multiply_share(&layer->qkv, task->normed, apart, tokens, qkv, own, team, worker);
        meet(team);
        normalise_heads(&shape, layer, task->qkv, packed, from, to);
        rotate_tokens(&shape, task->qkv, task->qkv + heads, stride, layer->cosines, layer->sines, layer->turned,
                      &task->step, from, to);
        if (!late)
            store_tokens(&shape, &task->step, &stored, from, to);
        meet(team);
        attend_items(&shape, &task->step, task->qkv, packed, &stored, late, room, attended, tokens, worker, team->count);
        meet(team);
        multiply_share(&layer->out, task->attended, attended.apart, tokens, added, own, team, worker);
        meet(team);
        pending = tokens;
        if (!inner)
            continue;
        rayskip_add_rms_norm(x, branch, layer->mlp_norm, normed, to - from, width, apart, layer->mlp_eps);
        meet(team);
        multiply_share(&layer->up, task->normed, apart, tokens, up, own, team, worker);
        meet(team);
        rayskip_silu_gate(task->up + from * gate_stride[0], task->gated + from * gate_stride[1], to - from, inner,
                          gate_stride);
        meet(team);
        multiply_share(&layer->down, task->gated, gate_stride[1], tokens, added, own, team, worker);
        meet(team);
    }
    add_share(task->x, task->branch, pending, width, team, worker);
}

/* Fill in the task's scratch; returns what to free, or NULL when memory is out. */
static char *set_up(LayersTask *task) {
    const Layer *layer = task->layers;
    task->shape = seen(task->shape, &task->step, task->tokens);
    element **parts[] = {&task->normed, &task->qkv, &task->attended, &task->up, &task->gated, &task->branch};
    const int64_t widths[] = {layer->qkv.in, layer->qkv.out, layer->out.in, layer->up.out, layer->down.in,
                              layer->out.out};
    const int64_t rooms = task->threads * to_lines(room_bytes(&task->shape));
    int64_t size = rooms + task->threads * operands_room(task);
    for (int i = 0; i < 6; i++)
        size += to_lines(task->tokens * spaced(widths[i]) * (int64_t)sizeof(element));
    char *scratch = aligned_alloc(64, size);
    if (!scratch)
        return NULL;
    task->rooms = scratch;
    task->operands = scratch + rooms;
    char *next = task->operands + task->threads * operands_room(task);
    for (int i = 0; i < 6; i++) {
        *parts[i] = (element *)next;
        next += to_lines(task->tokens * spaced(widths[i]) * (int64_t)sizeof(element));
    }
    return scratch;
}

/* Run the layers, in place. Returns 0, or 1 when memory is out. */
int rayskip_run_layers(LayersTask *task) {
    char *scratch = set_up(task);
    if (!scratch)
        return 1;
    const int failed = together((int)task->threads, work_on_layers, task);
    free(scratch);
    return failed;
}

/* Tokens on their way through a model's first layers, and what then comes of them through an adapter: `adapter` has its
 * layer, and an x of its own that is filled in. What follows tokens after [rows], at states of the adapter: places and
 * chances [rows, count], as `likeliest` has them of the head's outputs. */
typedef struct {
    LayersTask *layers, *adapter;
    const element *norm;
    float eps;
    const Rough *head; /* its outputs a multiple of LANES */
    const int64_t *after;
    int64_t rows, count, *places;
    float *chances;
    /* scratch: */
    element *normed, *logits;
    int16_t *whole;
    RoughRow *each;
} DraftTask;

static void work_on_draft(void *argument, Team *team, int worker) {
    const DraftTask *task = argument;
    const Rough *head = task->head;
    const int64_t tokens = task->layers->tokens, width = head->in, begin = share(tokens, team, worker) * width;
    work_on_layers(task->layers, team, worker);
    memcpy(task->adapter->x + begin, task->layers->x + begin,
           (share(tokens, team, worker + 1) * width - begin) * sizeof(element));
    work_on_layers(task->adapter, team, worker); /* begins with the tokens that were this worker's before */
    if (!task->rows)
        return;
    meet(team);
    const int64_t from = share(task->rows, team, worker), to = share(task->rows, team, worker + 1);
    for (int64_t row = from; row < to; row++) {
        element *normed = task->normed + row * width;
        rayskip_add_rms_norm(task->adapter->x + task->after[row] * width, NULL, task->norm, normed, 1, width, width,
                             task->eps);
        round_rows(normed, task->whole + row * rayskip_rough_width(width), task->each + row, 1, width);
    }
    meet(team);
    RoughTask product = {head, task->whole, task->each, task->logits, task->rows};
    work_on_rough_product(&product, team, worker);
    meet(team);
    rayskip_likeliest(task->logits + from * head->out, to - from, head->out, task->count,
                      task->places + from * task->count, task->chances + from * task->count);
}

/* One step of a draft. Scratch of the task is filled in here. Returns 0, or 1 when memory is out. */
int rayskip_draft(DraftTask *task) {
    const Rough *head = task->head;
    char *layers = set_up(task->layers), *adapter = set_up(task->adapter);
    task->normed = malloc(task->rows * head->in * sizeof(element) + 1);
    task->logits = aligned_alloc(64, 64 + to_lines(task->rows * head->out * (int64_t)sizeof(element)));
    task->whole = malloc(task->rows * rayskip_rough_width(head->in) * sizeof *task->whole + 1);
    task->each = malloc(task->rows * sizeof *task->each + 1);
    int failed = 1;
    if (layers && adapter && task->normed && task->logits && task->whole && task->each)
        failed = together((int)task->layers->threads, work_on_draft, task);
    free(layers);
    free(adapter);
    free(task->normed);
    free(task->logits);
    free(task->whole);
    free(task->each);
    return failed;
}
#endif

/* What library.py has structures of its own for, in its order. */
const int64_t rayskip_sizes[] = {sizeof(Shape),  sizeof(Step),
#ifdef PRODUCTS
                                 sizeof(Product), sizeof(Rough), sizeof(Layer), sizeof(LayersTask), sizeof(DraftTask)
#endif
};
