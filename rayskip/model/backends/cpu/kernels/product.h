/* Matrix products of a few to some hundred rows. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "blocks.h"
#include "outputs.h"
#include "thread_pool.h"

/* Products of up to so many rows read compressed weights: decompressing them takes less time than reading a quarter
 * more. */
#if !defined(COMPRESSED)
#define COMPRESSED_ROWS 0
#elif defined(EIGHTS)
#define COMPRESSED_ROWS 3
#else
#define COMPRESSED_ROWS BLOCK
#endif
#define SLAB_BYTES (192 << 10) /* bytes of panels that the second cache keeps for the next block of rows */
#define SPLIT_ROWS 128          /* rows per worker from which on workers divide the rows, not the panels */
#define PREFETCH_AHEAD 512      /* elements of a panel, where each is read once; of slabs the next one is prefetched */

/* From weight [out, in] to panels [out / COLUMNS, in / DEPTH, COLUMNS, DEPTH], the last one padded with zeros. in: a
 * multiple of DEPTH. */
void rayskip_to_panels(const element *weight, element *panels, int64_t out, int64_t in) {
    for (int64_t panel = 0; panel * COLUMNS < out; panel++)
        for (int64_t i = 0; i < in; i += DEPTH)
            for (int64_t column = panel * COLUMNS; column < (panel + 1) * COLUMNS; column++)
                for (int64_t j = 0; j < DEPTH; j++)
                    *panels++ = column < out ? weight[column * in + i + j] : (element)0;
}

/* A product's weights in panels (see rayskip_to_panels). bias [out, padded to whole panels] or NULL. lows and what follows:
 * NULL, or the same weights compressed, one panel after the other (see Compressed); odd_from: where each panel's part of
 * `odd` begins. */
typedef struct {
    const element *panels, *bias;
    int64_t out, in;
    const uint8_t *lows, *highs;
    const uint16_t *tables;
    const int64_t *odd, *odd_from;
    const element *whole;
} Product;

INLINE Compressed compressed_panel(const Product *product, int64_t panel) {
    const int64_t size = panel * COLUMNS * product->in, begin = product->odd_from[panel];
    return (Compressed){product->lows + size, product->highs + size / 2, product->tables + panel * TABLE,
                        product->odd + begin, product->whole + (begin - panel) * 2 * HALF};
}

/* A block of x [rows, in], `stride` operands from one row to the next, times one panel. prefetch, prefetch_stride: see
 * PanelProduct. */
INLINE void multiply_panel(const Product *product, int64_t panel, const operand *x, int64_t stride, Block block,
                           const element *prefetch, int64_t prefetch_stride, const bool compressed, Outputs to) {
    const int64_t in = product->in, column = panel * COLUMNS, left = product->out - column;
    const PanelProduct from = {x + block.row * stride, stride, in, product->panels + column * in, COLUMNS * DEPTH, prefetch,
                               prefetch_stride, compressed ? compressed_panel(product, panel) : (Compressed){0}};
    floats sums[BLOCK][2];
    add_block(&from, sums, compressed, true, block.rows);
    put_outputs(sums, product->bias ? product->bias + column : NULL, panel, left < COLUMNS ? left : COLUMNS, block.row,
                block.rows, to);
}

/* All rows, which are one block, times one panel. */
static void multiply_one_block(const Product *product, int64_t panel, const operand *x, int64_t stride, int64_t rows,
                               Outputs to) {
    const Block all = {0, rows};
    const element *prefetch = product->panels + panel * COLUMNS * product->in + PREFETCH_AHEAD;
    if (rows <= COMPRESSED_ROWS && product->lows)
        multiply_panel(product, panel, x, stride, all, prefetch, COLUMNS * DEPTH, true, to);
    else
        multiply_panel(product, panel, x, stride, all, prefetch, COLUMNS * DEPTH, false, to);
}

/* Rows of several blocks times panels [first, last): each block times a slab of panels, while the next slab is fetched. */
static void multiply_slabs(const Product *product, int64_t first, int64_t last, const operand *x, int64_t stride,
                          int64_t rows, Outputs to) {
    const int64_t size = COLUMNS * product->in, blocks = blocks_of(rows), prefetch_stride = COLUMNS * DEPTH / blocks;
    const int64_t fitting = SLAB_BYTES / (size * (int64_t)sizeof *product->panels), slab = fitting ? fitting : 1;
    for (; first < last; first += slab)
        for (int64_t index = 0; index < blocks; index++) {
            const Block block = block_of(rows, blocks, index);
            const element *prefetch = product->panels + (first + slab) * size + size * index / blocks;
            for (int64_t panel = first; panel < last && panel < first + slab; panel++, prefetch += size)
                multiply_panel(product, panel, x, stride, block, prefetch, prefetch_stride, false, to);
        }
}

/* x [rows, in], `stride` elements from one row to the next, times panels [first, last). workspace: operand_bytes(rows *
 * in). */
static void multiply_panels(const Product *product, int64_t first, int64_t last, const element *x, int64_t stride,
                          int64_t rows, operand *workspace, Outputs to) {
    const int64_t blocks = blocks_of(rows);
    if (!blocks)
        return; /* tiles of no rows may not even be zeroed */
    const operand *own = operands(x, &stride, workspace, rows, product->in);
    begin_blocks(rows, blocks, false);
    if (blocks > 1)
        multiply_slabs(product, first, last, own, stride, rows, to);
    else
        for (int64_t panel = first; panel < last; panel++)
            multiply_one_block(product, panel, own, stride, rows, to);
    end_blocks();
}

/* A worker's part of a product of x [rows, in], `stride` elements from one row to the next. Workers divide the panels or,
 * of many rows, the rows, since reading all rows would take longer then than reading all weights. workspace: the worker's
 * own, operand_bytes(rows * in). */
static void multiply_chunk(const Product *product, const element *x, int64_t stride, int64_t rows, Outputs to,
                           operand *workspace, ThreadPool *pool, int worker) {
    const int64_t panels = (product->out + COLUMNS - 1) / COLUMNS;
    if (rows < SPLIT_ROWS * pool->count)
        multiply_panels(product, chunk_begin(panels, pool, worker), chunk_begin(panels, pool, worker + 1), x, stride, rows,
                        workspace, to);
    else {
        const int64_t from = chunk_begin(rows, pool, worker), count = chunk_begin(rows, pool, worker + 1) - from;
        if (to.argmax)
            to.argmax += from;
        else if (to.unrounded)
            to.unrounded += from * to.stride;
        else
            to.out += from * to.stride;
        multiply_panels(product, 0, panels, x + from * stride, stride, count, workspace, to);
    }
}

#endif
