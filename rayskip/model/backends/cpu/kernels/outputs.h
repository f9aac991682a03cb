/* What becomes of a product's sums: they are stored, rounded or not, or only the largest of each row is kept. */
#ifndef OUTPUTS_H
#define OUTPUTS_H

#include <stdbool.h>

#include "operands.h"

/* The running argmax of one row: for each lane of a panel's halves the largest output so far and the first panel that has
 * it; -inf and -1 before there is any. */
typedef struct {
    floats values[2];
    ints panels[2];
} Argmax;

/* Where a product's outputs go: to out [rows, `stride` elements from one to the next]; or to unrounded [rows, `stride`]; or
 * into argmax [rows] where only the largest output of each row is asked for. */
typedef struct {
    element *out;
    int64_t stride;
    Argmax *argmax;
    float *unrounded;
} Outputs;

/* The stride of rows of `width` elements, many of which are read and written piece by piece in turn: an odd number of cache
 * lines, since a cache has few places for lines whose distance is a power of two. */
INLINE int64_t padded_stride(int64_t width) { return ((width + LINE - 1) / LINE | 1) * LINE; }

/* Store a row's outputs of one panel, given as its two halves. */
INLINE void store_line(element *to, const floats outputs[2]) {
#ifdef PAIRS
    const __m512bh line = _mm512_cvtne2ps_pbh((__m512)outputs[1], (__m512)outputs[0]);
    memcpy(to, &line, sizeof line);
#else
    store(to, outputs[0]);
    store(to + LANES, outputs[1]);
#endif
}

INLINE void init_argmax(Argmax *argmax) {
    for (int half = 0; half < 2; half++) {
        argmax->values[half] = broadcast(-INFINITY);
        argmax->panels[half] = -1 - (ints){0};
    }
}

/* Take a panel's outputs of the row into account: its first `count` columns, the others are padding. They are rounded as if
 * they were stored. */
INLINE void update_argmax(Argmax *argmax, int64_t panel, int64_t count, const floats outputs[2]) {
    element line[COLUMNS];
    store_line(line, outputs);
    for (int64_t column = count; column < COLUMNS; column++)
        line[column] = round_one(-INFINITY);
    for (int half = 0; half < 2; half++) {
        const floats own = load(line + half * LANES);
        const ints larger = own > argmax->values[half];
        argmax->values[half] = vector_max(own, argmax->values[half]);
        argmax->panels[half] = (larger & ((int32_t)panel - (ints){0})) | (~larger & argmax->panels[half]);
    }
}

/* Each row's largest output and the first column that has it, -1 where there is none. argmax [workers, rows]. */
static void reduce_argmax(const Argmax *argmax, int64_t workers, int64_t rows, float *values, int64_t *columns) {
    for (int64_t row = 0; row < rows; row++) {
        values[row] = -INFINITY;
        columns[row] = -1;
        for (int64_t at = row; at < workers * rows; at += rows)
            for (int i = 0; i < COLUMNS; i++) {
                const int half = i / LANES, lane = i % LANES;
                const float value = argmax[at].values[half][lane];
                const int64_t column = argmax[at].panels[half][lane] * (int64_t)COLUMNS + i;
                if (column >= 0 && (value > values[row] || (value == values[row] && column < columns[row]))) {
                    values[row] = value;
                    columns[row] = column;
                }
            }
    }
}

/* Put sums [rows, 2 halves] of a panel + bias (NULL: none) where outputs of the rows from `first` on go. The panel's first
 * `count` columns are outputs, the others padding. */
INLINE void put_outputs(floats (*sums)[2], const element *bias, int64_t panel, int64_t count, int64_t first,
                        int64_t rows, Outputs to) {
    for (int64_t row = 0; row < rows; row++) {
        const int64_t place = (first + row) * to.stride + panel * COLUMNS;
        floats outputs[2] = {sums[row][0], sums[row][1]};
        for (int half = 0; bias && half < 2; half++)
            outputs[half] += load(bias + half * LANES);
        if (to.argmax)
            update_argmax(to.argmax + first + row, panel, count, outputs);
        else if (to.unrounded)
            memcpy(to.unrounded + place, outputs, count * sizeof(float));
        else if (count < COLUMNS) {
            element line[COLUMNS];
            store_line(line, outputs);
            memcpy(to.out + place, line, count * sizeof *line);
        } else
            store_line(to.out + place, outputs);
    }
}

#endif
