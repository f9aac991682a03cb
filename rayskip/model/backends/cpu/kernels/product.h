/* Matrix products of a few to some hundred rows with packed weights. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "blocks.h"
#include "outputs.h"
#include "team.h"

/* FEW: rows for which unpacking weights takes less time than is saved in reading. */
#if !defined(PACKED)
#define FEW 0
#elif defined(EIGHTS)
#define FEW 3
#else
#define FEW BLOCK
#endif
#define SLAB (192 << 10) /* bytes of panels that the second cache keeps for the next block of rows */
#define MANY 128          /* rows of a worker from which on a product is divided by rows */
#define AHEAD 512         /* elements of a panel prefetched, where it is read once; else the next slab is */

/* weight [out, in] -> panels [out / COLUMNS, in / DEPTH, COLUMNS, DEPTH], filled up with zeros. in: a multiple of
 * DEPTH. */
void rayskip_pack(const element *weight, element *panels, int64_t out, int64_t in) {
    for (int64_t panel = 0; panel * COLUMNS < out; panel++)
        for (int64_t i = 0; i < in; i += DEPTH)
            for (int64_t column = panel * COLUMNS; column < (panel + 1) * COLUMNS; column++)
                for (int64_t j = 0; j < DEPTH; j++)
                    *panels++ = column < out ? weight[column * in + i + j] : (element)0;
}

/* A product's weights: `panels` from `pack`, bias [out, filled up to whole panels] or NULL. lows: NULL, or with what
 * follows the same weights again, all panels' parts one after the other (see Packed); odd_from: where a panel's lines
 * begin in `odd`. */
typedef struct {
    const element *panels, *bias;
    int64_t out, in;
    const uint8_t *lows, *highs;
    const uint16_t *tables;
    const int64_t *odd, *odd_from;
    const element *whole;
} Product;

INLINE Packed packed_panel(const Product *product, int64_t panel) {
    const int64_t size = panel * COLUMNS * product->in, begin = product->odd_from[panel];
    return (Packed){product->lows + size, product->highs + size / 2, product->tables + panel * TABLE, product->odd + begin,
                    product->whole + (begin - panel) * 2 * HALF};
}

/* A block of x [rows, in], `apart` operands from one to the next, times one panel. soon, pace: see Rows. */
INLINE void multiply_panel(const Product *product, int64_t panel, const operand *x, int64_t apart, Block block,
                           const element *soon, int64_t pace, const bool packed, Outputs to) {
    const int64_t in = product->in, column = panel * COLUMNS, left = product->out - column;
    const Rows from = {x + block.row * apart, apart, in, product->panels + column * in, COLUMNS * DEPTH, soon, pace,
                       packed ? packed_panel(product, panel) : (Packed){0}};
    floats sums[BLOCK][2];
    add_block(&from, sums, packed, true, block.rows);
    put_outputs(sums, product->bias ? product->bias + column : NULL, panel, left < COLUMNS ? left : COLUMNS, block.row,
                block.rows, to);
}

/* `multiply_panel` for rows that are one block, which read each panel once. */
static void multiply_few(const Product *product, int64_t panel, const operand *x, int64_t apart, int64_t rows, Outputs to) {
    const Block all = {0, rows};
    const element *soon = product->panels + panel * COLUMNS * product->in + AHEAD;
    if (rows <= FEW && product->lows)
        multiply_panel(product, panel, x, apart, all, soon, COLUMNS * DEPTH, true, to);
    else
        multiply_panel(product, panel, x, apart, all, soon, COLUMNS * DEPTH, false, to);
}

/* Rows of several blocks times panels [first, last): each block times a slab of panels, while the next slab is fetched. */
static void multiply_many(const Product *product, int64_t first, int64_t last, const operand *x, int64_t apart,
                          int64_t rows, Outputs to) {
    const int64_t size = COLUMNS * product->in, blocks = blocks_of(rows), pace = COLUMNS * DEPTH / blocks;
    const int64_t fitting = SLAB / (size * (int64_t)sizeof *product->panels), slab = fitting ? fitting : 1;
    for (; first < last; first += slab)
        for (int64_t index = 0; index < blocks; index++) {
            const Block block = block_of(rows, blocks, index);
            const element *soon = product->panels + (first + slab) * size + size * index / blocks;
            for (int64_t panel = first; panel < last && panel < first + slab; panel++, soon += size)
                multiply_panel(product, panel, x, apart, block, soon, pace, false, to);
        }
}

/* x [rows, in], `apart` elements from one to the next, times panels [first, last). room: for operand_bytes(rows * in). */
static void multiply_part(const Product *product, int64_t first, int64_t last, const element *x, int64_t apart,
                          int64_t rows, operand *room, Outputs to) {
    const int64_t blocks = blocks_of(rows);
    if (!blocks)
        return; /* tiles of no rows may not even be cleared */
    const operand *own = operands(x, &apart, room, rows, product->in);
    begin_blocks(rows, blocks, false);
    if (blocks > 1)
        multiply_many(product, first, last, own, apart, rows, to);
    else
        for (int64_t panel = first; panel < last; panel++)
            multiply_few(product, panel, own, apart, rows, to);
    end_blocks();
}

/* A worker's part of a product of x [rows, in], `apart` elements from one to the next: some panels for all rows or, of many
 * rows, some for all panels, since then other workers' rows take longer to read than weights. room: of the worker's own, for
 * operand_bytes(rows * in). */
static void multiply_share(const Product *product, const element *x, int64_t apart, int64_t rows, Outputs to,
                           operand *room, Team *team, int worker) {
    const int64_t panels = (product->out + COLUMNS - 1) / COLUMNS;
    if (rows < MANY * team->count)
        multiply_part(product, share(panels, team, worker), share(panels, team, worker + 1), x, apart, rows, room, to);
    else {
        const int64_t from = share(rows, team, worker), count = share(rows, team, worker + 1) - from;
        if (to.best)
            to.best += from;
        else
            to.out += from * to.apart;
        multiply_part(product, 0, panels, x + from * apart, apart, count, room, to);
    }
}

#endif
