/* What becomes of a product's sums. */
#ifndef OUTPUTS_H
#define OUTPUTS_H

#include <stdbool.h>

#include "operands.h"

/* Of each lane of a panel's halves, the highest output of a row and the first panel that has it; -inf and -1: none
 * yet. */
typedef struct {
    floats values[2];
    ints panels[2];
} Best;

/* Where a product's outputs go: out [rows, `apart` elements from one to the next]; or best [rows], where nothing but the
 * highest of each row is asked for. */
typedef struct {
    element *out;
    int64_t apart;
    Best *best;
} Outputs;

/* Elements from a row of `width` to the next where rows are read and written piece by piece, many at a time: an odd number
 * of cache lines, since a cache has few places for lines that are a power of two apart. */
INLINE int64_t spaced(int64_t width) { return ((width + LINE - 1) / LINE | 1) * LINE; }

/* Two halves of a panel's outputs of a row. */
INLINE void store_line(element *to, const floats outputs[2]) {
#ifdef PAIRS
    const __m512bh line = _mm512_cvtne2ps_pbh((__m512)outputs[1], (__m512)outputs[0]);
    memcpy(to, &line, sizeof line);
#else
    store(to, outputs[0]);
    store(to + LANES, outputs[1]);
#endif
}

INLINE void begin_best(Best *best) {
    for (int half = 0; half < 2; half++) {
        best->values[half] = splat(-INFINITY);
        best->panels[half] = -1 - (ints){0};
    }
}

/* The highest of a row's outputs and of a panel's, of which `count` columns are outputs. */
INLINE void keep_best(Best *best, int64_t panel, int64_t count, const floats outputs[2]) {
    element line[COLUMNS];
    store_line(line, outputs);
    for (int64_t column = count; column < COLUMNS; column++)
        line[column] = round_one(-INFINITY);
    for (int half = 0; half < 2; half++) {
        const floats own = load(line + half * LANES);
        const ints higher = own > best->values[half];
        best->values[half] = larger(own, best->values[half]);
        best->panels[half] = (higher & ((int32_t)panel - (ints){0})) | (~higher & best->panels[half]);
    }
}

/* The highest of each row's outputs and the first column it stands at, -1 where there is none. best [workers, rows]. */
static void best_of_all(const Best *best, int64_t workers, int64_t rows, float *values, int64_t *columns) {
    for (int64_t row = 0; row < rows; row++) {
        values[row] = -INFINITY;
        columns[row] = -1;
        for (int64_t at = row; at < workers * rows; at += rows)
            for (int i = 0; i < COLUMNS; i++) {
                const int half = i / LANES, lane = i % LANES;
                const float value = best[at].values[half][lane];
                const int64_t column = best[at].panels[half][lane] * (int64_t)COLUMNS + i;
                if (column >= 0 && (value > values[row] || (value == values[row] && column < columns[row]))) {
                    values[row] = value;
                    columns[row] = column;
                }
            }
    }
}

/* sums [rows, 2 halves] of a panel and of rows from `first` on, + bias (NULL: none) -> their place in a product's outputs.
 * count: of the panel's columns, those that are outputs. */
INLINE void put_outputs(floats (*sums)[2], const element *bias, int64_t panel, int64_t count, int64_t first,
                        int64_t rows, Outputs to) {
    for (int64_t row = 0; row < rows; row++) {
        const int64_t place = (first + row) * to.apart + panel * COLUMNS;
        floats outputs[2] = {sums[row][0], sums[row][1]};
        for (int half = 0; bias && half < 2; half++)
            outputs[half] += load(bias + half * LANES);
        if (to.best)
            keep_best(to.best + first + row, panel, count, outputs);
        else if (count < COLUMNS) {
            element line[COLUMNS];
            store_line(line, outputs);
            memcpy(to.out + place, line, count * sizeof *line);
        } else
            store_line(to.out + place, outputs);
    }
}

#endif
