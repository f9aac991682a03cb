/* Rows in blocks that share one reading of a panel. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "tiles.h"

#ifdef TILES
#define BLOCK (2 * TILE_ROWS) /* rows at most */
#define GRAIN TILE_INPUTS     /* inputs that are added up at once */
#define HEADS TILE_ROWS       /* that attend as one token at most: room is left for several tokens */
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

/* One of `blocks` of `rows`, of like size. With tiles all have the same, since setting it anew takes time: rows in which
 * two overlap are computed twice. */
INLINE Block block_of(int64_t rows, int64_t blocks, int64_t index) {
#ifdef TILES
    const int64_t size = block_size(rows, blocks), last = rows - size;
    return (Block){index * size < last ? index * size : last, size};
#else
    const int64_t row = rows * index / blocks;
    return (Block){row, rows * (index + 1) / blocks - row};
#endif
}

/* Before a thread's products of so many rows in so many blocks; others may follow without an end. bytes: for tile_bytes,
 * whose second tiles hold the same rows' lower bytes. */
INLINE void begin_blocks(int64_t rows, int64_t blocks, const bool bytes) {
#ifdef TILES
    const int size = (int)block_size(rows, blocks), first = bytes ? size : first_rows(size);
    begin_tiles(first, bytes ? size : size - first);
#endif
}

/* After a thread's last product: nothing that was set outlives a call of the kernels. */
INLINE void end_blocks(void) {
#ifdef TILES
    end_tiles();
#endif
}

/* sums [rows, 2 halves of the panel] += the products of a block's rows, or = where they are `fresh`. */
INLINE void add_block(const Rows *from, floats (*sums)[2], const bool packed, const bool fresh, int64_t rows) {
#ifdef TILES
    tile_rows(from, sums, packed, fresh, (int)rows);
#else
    if (fresh)
        memset(sums, 0, rows * sizeof *sums);
#define OF(count) \
    case count: \
        add_rows(from, sums, packed, count); \
        break;
    switch (rows) { COUNTS(OF) }
#undef OF
#endif
}

#endif
