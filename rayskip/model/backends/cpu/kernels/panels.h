/* The inner loop of all matrix products, those of attention included: some rows of inputs times one panel. With AMX that of
 * tiles.h runs instead. */
#ifndef PANELS_H
#define PANELS_H

#include <stdbool.h>

#include "compressed.h"

/* Some rows times a panel. x [rows, in], `stride` operands from one row to the next. panel: `panel_stride` elements from
 * DEPTH inputs to the next DEPTH. prefetch: what to fetch into the cache meanwhile, `prefetch_stride` elements further for
 * every DEPTH inputs. compressed: the same weights as the panel, where those are to be read. */
typedef struct {
    const operand *x;
    int64_t stride, in;
    const element *panel;
    int64_t panel_stride;
    const element *prefetch;
    int64_t prefetch_stride;
    Compressed compressed;
} PanelProduct;

/* to [rows, 2 halves of the panel] += the products. A sum adds up the inputs in their order, whatever `rows` and however
 * the inputs are divided among calls: so a row's result depends on no other row. */
INLINE void add_rows(const PanelProduct *from, floats (*to)[2], const bool compressed, const int rows) {
    floats sums[ROWS][2];
    const operand *x = from->x;
    const element *panel = from->panel, *prefetch = from->prefetch;
    Compressed lines = from->compressed;
    const int64_t in = from->in, stride = from->stride;
    const int64_t panel_stride = from->panel_stride, prefetch_stride = from->prefetch_stride;
    const ExponentTable table = compressed ? load_table(from->compressed.table) : (ExponentTable){0};
    for (int row = 0; row < rows; row++) {
        sums[row][0] = to[row][0];
        sums[row][1] = to[row][1];
    }
    for (int64_t i = 0; i < in; i += DEPTH) {
        Line own;
        if (!compressed) {
            for (int64_t line = 0; line < COLUMNS * DEPTH; line += LINE)
                __builtin_prefetch(prefetch + line);
            own = (Line){load_weights(panel), load_weights(panel + HALF)};
            panel += panel_stride;
            prefetch += prefetch_stride;
        } else
            own = next_line(&lines, table, i);
        for (int part = 0; part < STEPS; part++) {
            factors left = factors_of(own.left, part), right = factors_of(own.right, part);
            for (int row = 0; row < rows; row++) {
                factors value = broadcast_operand(x + row * stride + i + part);
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
