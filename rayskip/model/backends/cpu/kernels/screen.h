/* The highest of a product's outputs, and its place, without most of them: a rough product first, from which bounds for
 * every output follow by Cauchy-Schwarz (|w.x - w'.x'| <= |w - w'| |x| + |w'| |x - x'|), then the exact product of those
 * panels that may hold the highest. Of SmolLM2-135M's head, 2 or 3 of 3,072 are left. */
#ifndef SCREEN_H
#define SCREEN_H

#include "rough.h"

/* SCREENED: rows up to which this takes less time than all outputs, which tiles compute for many rows at once;
 * SCREENED_BESIDE: where there are rows that need all outputs anyway, which rows of a tile share. */
#ifdef TILES
#define SCREENED 24
#define SCREENED_BESIDE 0
#else
#define SCREENED INT64_MAX
#define SCREENED_BESIDE INT64_MAX
#endif
#define FLUSHED 1e-33f /* more than what the processor takes for zero in the sums of an output */

/* best [workers, rows]: of those of a worker's panels that may have the highest exact output. most [panels, rows]: no
 * output of a panel is higher; least [workers, rows]: some output is at least as high. */
typedef struct {
    const Rough *rough;
    const Product *exact;
    const int16_t *whole;
    const RoughRow *each;
    const operand *x;
    int64_t rows;
    float *most, *least;
    Best *best;
} ScreenTask;

typedef struct {
    const ScreenTask *task;
    float *least;
} Bounds;

INLINE void store_bounds(void *to, int64_t panel, int64_t row, const ints sums[ROUGH_ROWS][2], int count) {
    const Bounds *bounds = to;
    const ScreenTask *task = bounds->task;
    const Rough *rough = task->rough;
    for (int i = 0; i < count; i++, row++) {
        const RoughRow own = task->each[row];
        floats high[2], low[2];
        for (int half = 0; half < 2; half++) {
            const int64_t column = panel * COLUMNS + half * LANES;
            floats length, residue;
            memcpy(&length, rough->lengths + column, sizeof length);
            memcpy(&residue, rough->residues + column, sizeof residue);
            const floats value = rough_outputs(sums[i][half], rough->scales + column, own.scale);
            const floats off = length * own.residue + residue * own.length + FLUSHED;
            high[half] = value + off;
            low[half] = value - off;
        }
        task->most[panel * task->rows + row] = maximum(larger(high[0], high[1]));
        const float least = maximum(larger(low[0], low[1]));
        if (least > bounds->least[row])
            bounds->least[row] = least;
    }
}

static void work_on_screen(void *argument, Team *team, int worker) {
    const ScreenTask *task = argument;
    const Product *exact = task->exact;
    const int64_t rows = task->rows, panels = (exact->out + COLUMNS - 1) / COLUMNS;
    Bounds bounds = {task, task->least + worker * rows};
    for (int64_t row = 0; row < rows; row++)
        bounds.least[row] = -INFINITY;
    each_rough_panel(task->rough, task->whole, rows, team, worker, store_bounds, &bounds);
    meet(team);
    begin_blocks(1, 1, false);
    for (int64_t row = 0; row < rows; row++) {
        float least = -INFINITY;
        if (!(task->each[row].length < INFINITY))
            continue;
        for (int other = 0; other < team->count; other++)
            least = fmaxf(least, task->least[other * rows + row]);
        least = load_one(round_one(least)); /* outputs are rounded: what is lower only by that is as high */
        const Outputs to = {.best = task->best + worker * rows + row};
        for (int64_t panel = share(panels, team, worker); panel < share(panels, team, worker + 1); panel++)
            if (load_one(round_one(task->most[panel * rows + row])) >= least)
                multiply_few(exact, panel, task->x + row * exact->in, exact->in, 1, to);
    }
    end_blocks();
}

#endif
