/* Rows of inputs times panels: what matrix products and attention have in common. */
#ifndef PANELS_H
#define PANELS_H

#include <stdbool.h>

#include "packed.h"

/* Some rows of `in` inputs, `apart` operands from one to the next, times a panel, in which it is `step` elements from
 * DEPTH inputs to the next DEPTH. soon: what is to be fetched meanwhile, `pace` elements for every DEPTH inputs. packed:
 * the panel's weights, in place of the panel; the next panel's follow it. */
typedef struct {
    const operand *x;
    int64_t apart, in;
    const element *panel;
    int64_t step;
    const element *soon;
    int64_t pace;
    Packed packed;
} Rows;

/* to [rows, 2 halves of the panel] += the products. Each sum runs over the inputs in their order, whatever `rows` and
 * however the inputs are divided among calls. */
INLINE void add_rows(const Rows *from, floats (*to)[2], const bool packed, const int rows) {
    floats sums[ROWS][2];
    const operand *x = from->x;
    const element *panel = from->panel, *soon = from->soon;
    Packed lines = from->packed;
    const int64_t in = from->in, apart = from->apart, step = from->step, pace = from->pace;
    const Table table = packed ? load_table(from->packed.table) : (Table){0};
    for (int row = 0; row < rows; row++) {
        sums[row][0] = to[row][0];
        sums[row][1] = to[row][1];
    }
    for (int64_t i = 0; i < in; i += DEPTH) {
        Line own;
        if (!packed) {
            for (int64_t line = 0; line < COLUMNS * DEPTH; line += LINE)
                __builtin_prefetch(soon + line);
            own = (Line){load_held(panel), load_held(panel + HALF)};
            panel += step;
            soon += pace;
        } else
            own = next_line(&lines, table, i);
        for (int part = 0; part < STEPS; part++) {
            factors left = factors_of(own.left, part), right = factors_of(own.right, part);
            for (int row = 0; row < rows; row++) {
                factors value = spread(x + row * apart + i + part);
                sums[row][0] = accumulate(sums[row][0], left, value);
                sums[row][1] = accumulate(sums[row][1], right, value);
            }
        }
    }
    for (int row = 0; row < rows; row++) {
        to[row][0] = sums[row][0];
        to[row][1] = sums[row][1];
    }
}

#endif
