/* Int8 products: weights rounded to eight bits, half as much to read, and inputs to as many bits as sums of 32 bits allow.
 * For the heads of drafters, which may be wrong, and for bounded_argmax.h. @GAIN@
 *
 * A reader may skip this file: no output of the model itself comes from it. */
#ifndef INT8_PRODUCT_H
#define INT8_PRODUCT_H

#include "product.h"

#define TINY 1e-30f /* a row of inputs or a column of weights with nothing larger counts as zeros */
#define LIMIT 1e15f /* sums of products of smaller numbers are finite */

/* INT8_ROWS: rows that one reading of a panel serves. INT8_DEPTH: successive inputs whose weights of a column lie side by
 * side. INT8_STEP: inputs that one step of the product adds up. */
#ifdef TILES
#define INT8_ROWS TILE_ROWS
#define INT8_DEPTH 4
#define INT8_STEP (TILE_LINES * INT8_DEPTH)
#else
#define INT8_ROWS 5
#define INT8_DEPTH 2
#define INT8_STEP 2
#endif

/* How many inputs there are with the zeros that pad them to whole steps. */
int64_t rayskip_int8_width(int64_t in) { return (in + INT8_STEP - 1) / INT8_STEP * INT8_STEP; }

/* panels [out / COLUMNS, int8_width / INT8_DEPTH, COLUMNS, INT8_DEPTH], the last one padded with copies of the last
 * column. For each column: scales: the weight that 1 stands for; norms: the Euclidean norm of its rounded weights;
 * error_norms: that of what rounding took from them. Both norms are a little too large, which makes up for the rounding of
 * sums. in: even. */
typedef struct {
    const int8_t *panels;
    const float *scales, *norms, *error_norms;
    int64_t out, in;
} Int8Weights;

/* From weight [out, in] to all of `Int8Weights`. A column's largest weight becomes 127. */
void rayskip_to_int8_panels(const element *weight, int8_t *panels, float *scales, float *norms, float *error_norms,
                        int64_t out, int64_t in) {
    const int64_t width = rayskip_int8_width(in);
    for (int64_t column = 0; column < (out + COLUMNS - 1) / COLUMNS * COLUMNS; column++) {
        const element *own = weight + (column < out ? column : out - 1) * in;
        int8_t *to = panels + column / COLUMNS * COLUMNS * width + column % COLUMNS * INT8_DEPTH;
        float most = 0;
        for (int64_t i = 0; i < in; i++)
            most = fmaxf(most, fabsf(load_one(own[i])));
        const float scale = most < TINY ? 0 : most / 127;
        double squares = 0, error_squares = 0;
        for (int64_t i = 0; i < in; i++) {
            const float one = load_one(own[i]), integer = scale > 0 ? rintf(one / scale) : 0;
            const double left = (double)one - (double)integer * scale;
            to[i / INT8_DEPTH * COLUMNS * INT8_DEPTH + i % INT8_DEPTH] = (int8_t)integer;
            squares += (double)integer * scale * integer * scale;
            error_squares += left * left;
        }
        for (int64_t i = in; i < width; i++)
            to[i / INT8_DEPTH * COLUMNS * INT8_DEPTH + i % INT8_DEPTH] = 0;
        /* the error of a sum of `in` products of floats is less than this part of the products of the norms */
        const double slack = (double)(in + 16) / (1 << 23);
        scales[column] = scale;
        norms[column] = (float)(sqrt(squares) * (1 + 1e-6));
        const double error = sqrt(error_squares) + slack * (sqrt(squares) + sqrt(error_squares));
        error_norms[column] = (float)(error * (1 + 1e-6)) + TINY;
    }
}

/* A row of rounded inputs: what 1 stands for, the norm of the inputs and that of what rounding took from them, as in
 * `Int8Weights`. */
typedef struct {
    float scale, norm, error_norm;
} QuantizedRow;

/* Store a rounded input of a row. For tiles it is two bytes: the upper ones of all inputs come before the lower ones. */
INLINE void put_quantized(int16_t *row, int64_t width, int64_t i, int32_t integer) {
#ifdef TILES
    ((int8_t *)row)[i] = (int8_t)(integer >> 8);
    ((uint8_t *)row)[width + i] = (uint8_t)integer;
#else
    row[i] = (int16_t)integer;
#endif
}

/* to [rows, int8_width] = x [rows, in], rounded. A row that is not finite, or so large that sums may not be, has a scale
 * and a norm of NaN. */
static void quantize_rows(const element *x, int16_t *to, QuantizedRow *info, int64_t rows, int64_t in) {
    const int64_t width = rayskip_int8_width(in);
    const int64_t finest = INT32_MAX / (127 * in) < INT16_MAX ? INT32_MAX / (127 * in) : INT16_MAX;
    for (int64_t row = 0; row < rows; row++, x += in, to += width) {
        float most = 0;
        bool broken = false;
        for (int64_t i = 0; i < in; i++) {
            const float one = fabsf(load_one(x[i]));
            broken |= !(one < LIMIT);
            most = one > most ? one : most;
        }
        const float scale = most < TINY ? 0 : most / finest, inverse = scale > 0 ? 1 / scale : 0;
        double squares = 0, error_squares = 0;
        for (int64_t i = 0; i < in; i++) {
            const float one = load_one(x[i]), integer = broken ? 0 : rintf(one * inverse);
            const double left = (double)one - (double)integer * scale;
            put_quantized(to, width, i, (int32_t)integer);
            squares += (double)one * one;
            error_squares += left * left;
        }
        for (int64_t i = in; i < width; i++)
            put_quantized(to, width, i, 0);
        info[row] = (QuantizedRow){broken ? NAN : scale, broken ? NAN : (float)(sqrt(squares) * (1 + 1e-6)),
                               (float)(sqrt(error_squares) * (1 + 1e-6)) + TINY};
    }
}

#ifdef TILES
/* sums [rows, 2 halves of the panel] = x [rows, int8_width] times one panel. */
INLINE void multiply_int8(const int16_t *x, const int8_t *panel, int64_t width, ints sums[INT8_ROWS][2], int rows) {
    ints lower[INT8_ROWS][2];
    tile_bytes((const int8_t *)x, (const uint8_t *)x + width, 2 * width, panel, width, sums, lower);
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++) /* unsigned, since the upper part alone may overflow */
            sums[row][half] = (ints)(((bits)sums[row][half] << 8) + (bits)lower[row][half]);
}
#else
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));

INLINE shorts load_int8(const int8_t *from) {
#ifdef EIGHTS
    return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
#else
    return (shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
#endif
}

/* to + the products, of which two neighbours are added up to one sum */
INLINE ints add_pairs(ints to, shorts a, shorts b) {
#ifdef EIGHTS
    return to + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return to + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}

INLINE void multiply_int8_rows(const int16_t *x, const int8_t *panel, int64_t width, ints sums[INT8_ROWS][2],
                                const int rows) {
    for (int row = 0; row < rows; row++)
        sums[row][0] = sums[row][1] = (ints){0};
    for (int64_t i = 0; i < width; i += 2, panel += 2 * COLUMNS) {
        __builtin_prefetch(panel + 2 * PREFETCH_AHEAD);
        const shorts left = load_int8(panel), right = load_int8(panel + COLUMNS);
        for (int row = 0; row < rows; row++) {
            int32_t both;
            memcpy(&both, x + row * width + i, sizeof both);
            const shorts value = (shorts)(both - (ints){0});
            sums[row][0] = add_pairs(sums[row][0], left, value);
            sums[row][1] = add_pairs(sums[row][1], right, value);
        }
    }
}

/* sums [rows, 2 halves of the panel] = x [rows, int8_width] times one panel. */
INLINE void multiply_int8(const int16_t *x, const int8_t *panel, int64_t width, ints sums[INT8_ROWS][2], int rows) {
#define OF(count) \
    case count: \
        multiply_int8_rows(x, panel, width, sums, count); \
        break;
    switch (rows) { OF(1) OF(2) OF(3) OF(4) OF(5) }
#undef OF
}
_Static_assert(INT8_ROWS == 5, "a case of multiply_int8 for every count of rows");
#endif

/* Sums of one half of a panel as outputs. */
INLINE floats int8_outputs(ints sums, const float *scales, float scale) {
    floats own;
    memcpy(&own, scales, sizeof own);
    return __builtin_convertvector(sums, floats) * scale * own;
}

/* What is done with the sums of a panel and `count` rows from `row` on. A row may come twice (see block_of). */
typedef void UseSums(void *to, int64_t panel, int64_t row, const ints sums[INT8_ROWS][2], int count);

/* A worker's part of x [rows, in] times all panels: of each panel, what `use` does with the sums. */
INLINE void for_each_int8_panel(const Int8Weights *weights, const int16_t *x, int64_t rows, ThreadPool *pool, int worker,
                                UseSums *use, void *to) {
    const int64_t panels = (weights->out + COLUMNS - 1) / COLUMNS, width = rayskip_int8_width(weights->in);
    const int64_t blocks = (rows + INT8_ROWS - 1) / INT8_ROWS;
    begin_blocks(rows, blocks, true);
    for (int64_t panel = chunk_begin(panels, pool, worker); panel < chunk_begin(panels, pool, worker + 1); panel++) {
        const int8_t *own = weights->panels + panel * COLUMNS * width;
        for (int64_t index = 0; index < blocks; index++) {
            const Block block = block_of(rows, blocks, index);
            ints sums[INT8_ROWS][2];
            multiply_int8(x + block.row * width, own, width, sums, (int)block.rows);
            use(to, panel, block.row, sums, (int)block.rows);
        }
    }
    end_blocks();
}

typedef struct {
    const Int8Weights *weights;
    const int16_t *x;
    const QuantizedRow *info;
    element *out;
    int64_t rows;
} Int8Task;

INLINE void store_int8_outputs(void *to, int64_t panel, int64_t row, const ints sums[INT8_ROWS][2], int count) {
    const Int8Task *task = to;
    const Int8Weights *weights = task->weights;
    const int64_t column = panel * COLUMNS, left = weights->out - column, width = left < COLUMNS ? left : COLUMNS;
    for (int i = 0; i < count; i++) {
        element line[COLUMNS];
        for (int half = 0; half < 2; half++)
            store(line + half * LANES,
                  int8_outputs(sums[i][half], weights->scales + column + half * LANES, task->info[row + i].scale));
        memcpy(task->out + (row + i) * weights->out + column, line, width * sizeof *line);
    }
}

static void int8_product_worker(void *argument, ThreadPool *pool, int worker) {
    Int8Task *task = argument;
    for_each_int8_panel(task->weights, task->x, task->rows, pool, worker, store_int8_outputs, task);
}

#endif
