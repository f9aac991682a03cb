/* The bounded argmax: each row's largest output of the head and where it stands, without most of the outputs. @GAIN@
 *
 * A reader may skip this file: rayskip_product_argmax (kernels.c) gives the same bits from all outputs.
 *
 * An int8 product comes first. It bounds every output from above and from below by Cauchy-Schwarz, |w.x - w'.x'| <= |w -
 * w'| |x| + |w'| |x - x'|. Then the exact product runs for those panels alone that may hold the largest output: of
 * SmolLM2-135M's head 2 or 3 of 3,072. */
#ifndef BOUNDED_ARGMAX_H
#define BOUNDED_ARGMAX_H

#include "int8_product.h"

/* BOUNDED_ROWS: up to so many rows this takes less time than computing all outputs, which tiles do for many rows at once.
 * BOUNDED_ROWS_BESIDE: the same beside rows that need all outputs anyway, since rows of one tile cost nothing more. */
#ifdef TILES
#define BOUNDED_ROWS 24
#define BOUNDED_ROWS_BESIDE 0
#else
#define BOUNDED_ROWS INT64_MAX
#define BOUNDED_ROWS_BESIDE INT64_MAX
#endif
#define FLUSHED 1e-33f /* more than an output loses where the processor takes tiny numbers for zero */

/* upper [panels, rows]: no output of a panel is larger. lower [workers, rows]: some output of the worker's panels is at
 * least as large. argmax [workers, rows]: of exact outputs, of those of a worker's panels that may hold the largest. */
typedef struct {
    const Int8Weights *weights;
    const Product *exact;
    const int16_t *quantized; /* the rows' inputs for `weights`, and x for `exact` */
    const QuantizedRow *info;
    const operand *x;
    int64_t rows;
    float *upper, *lower;
    Argmax *argmax;
} BoundedArgmaxTask;

/* lower [rows]: the worker's own. */
typedef struct {
    const BoundedArgmaxTask *task;
    float *lower;
} Bounds;

INLINE void store_bounds(void *to, int64_t panel, int64_t row, const ints sums[INT8_ROWS][2], int count) {
    const Bounds *bounds = to;
    const BoundedArgmaxTask *task = bounds->task;
    const Int8Weights *weights = task->weights;
    for (int i = 0; i < count; i++, row++) {
        const QuantizedRow own = task->info[row];
        floats high[2], low[2];
        for (int half = 0; half < 2; half++) {
            const int64_t column = panel * COLUMNS + half * LANES;
            floats norm, error_norm;
            memcpy(&norm, weights->norms + column, sizeof norm);
            memcpy(&error_norm, weights->error_norms + column, sizeof error_norm);
            const floats value = int8_outputs(sums[i][half], weights->scales + column, own.scale);
            const floats off = norm * own.error_norm + error_norm * own.norm + FLUSHED;
            high[half] = value + off;
            low[half] = value - off;
        }
        task->upper[panel * task->rows + row] = reduce_max(vector_max(high[0], high[1]));
        const float lower = reduce_max(vector_max(low[0], low[1]));
        if (lower > bounds->lower[row])
            bounds->lower[row] = lower;
    }
}

static void bounded_argmax_worker(void *argument, ThreadPool *pool, int worker) {
    const BoundedArgmaxTask *task = argument;
    const Product *exact = task->exact;
    const int64_t rows = task->rows, panels = (exact->out + COLUMNS - 1) / COLUMNS;
    Bounds bounds = {task, task->lower + worker * rows};
    for (int64_t row = 0; row < rows; row++)
        bounds.lower[row] = -INFINITY;
    for_each_int8_panel(task->weights, task->quantized, rows, pool, worker, store_bounds, &bounds);
    barrier(pool);
    begin_blocks(1, 1, false);
    for (int64_t row = 0; row < rows; row++) {
        float lower = -INFINITY;
        if (!(task->info[row].norm < INFINITY))
            continue;
        for (int other = 0; other < pool->count; other++)
            lower = fmaxf(lower, task->lower[other * rows + row]);
        lower = load_one(round_one(lower)); /* outputs are rounded: two that differ by less are equal */
        const Outputs to = {.argmax = task->argmax + worker * rows + row};
        for (int64_t panel = chunk_begin(panels, pool, worker); panel < chunk_begin(panels, pool, worker + 1); panel++)
            if (load_one(round_one(task->upper[panel * rows + row])) >= lower)
                multiply_one_block(exact, panel, task->x + row * exact->in, exact->in, 1, to);
    }
    end_blocks();
}

#endif
