/* Blocks of rows: as many rows as one reading of a panel serves, in registers or in tiles. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "tiles.h"

#ifdef TILES
#define BLOCK (2 * TILE_ROWS) /* rows of a block, at most */
#define GRAIN TILE_INPUTS     /* inputs that one step of a product adds up */
#define HEADS TILE_ROWS       /* query heads of one token in a block, at most: several tokens fit */
#else
#define BLOCK ROWS
#define GRAIN DEPTH
#define HEADS (ROWS == 12 ? 4 : ROWS)
#endif

typedef struct {
    int64_t row, rows;
} Block;

INLINE int64_t blocks_of(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

/* Rows of the largest block. */
INLINE int64_t block_size(int64_t rows, int64_t blocks) { return blocks ? (rows + blocks - 1) / blocks : 0; }

/* One of `blocks` blocks of about the same size. With tiles all have exactly the same, since setting another takes time:
 * blocks may overlap then, and rows of two are computed twice. */
INLINE Block block_of(int64_t rows, int64_t blocks, int64_t index) {
#ifdef TILES
    const int64_t size = block_size(rows, blocks), last = rows - size;
    return (Block){index * size < last ? index * size : last, size};
#else
    const int64_t row = rows * index / blocks;
    return (Block){row, rows * (index + 1) / blocks - row};
#endif
}

/* To be called before a thread's products of so many rows in so many blocks, and again before those of another size. bytes:
 * for tile_bytes, whose second tiles hold the lower bytes of the same rows. */
INLINE void begin_blocks(int64_t rows, int64_t blocks, const bool bytes) {
#ifdef TILES
    const int size = (int)block_size(rows, blocks), first = bytes ? size : first_rows(size);
    begin_tiles(first, bytes ? size : size - first);
#endif
}

/* To be called after a thread's last product: what was set must not outlive a call of the kernels. */
INLINE void end_blocks(void) {
#ifdef TILES
    end_tiles();
#endif
}

/* sums [rows, 2 halves of the panel] += the products of a block's rows, or = if `fresh`. */
INLINE void add_block(const PanelProduct *from, floats (*sums)[2], const bool compressed, const bool fresh, int64_t rows) {
#ifdef TILES
    tile_rows(from, sums, compressed, fresh, (int)rows);
#else
    if (fresh)
        memset(sums, 0, rows * sizeof *sums);
#define OF(count) \
    case count: \
        add_rows(from, sums, compressed, count); \
        break;
    switch (rows) { COUNTS(OF) }
#undef OF
#endif
}

#endif
