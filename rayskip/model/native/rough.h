/* Matrix products with weights rounded to eight bits, half as much to read: for drafts, which may be wrong. */
#ifndef ROUGH_H
#define ROUGH_H

#include "product.h"

#define ROUGH_ROWS 6 /* that share one reading of a panel */

INLINE floats load_rough(const int8_t *from) {
#ifdef EIGHTS
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#endif
}

/* panels [out / COLUMNS, in, COLUMNS], columns filled up with zeros; scales [out, filled up to whole
 * panels]: what a weight of 1 stands for in each column. */
typedef struct {
    const int8_t *panels;
    const float *scales;
    int64_t out, in;
} Rough;

/* weight [out, in] -> panels and scales: a column's largest weight becomes 127. */
void pack_rough(const element *weight, int8_t *panels, float *scales, int64_t out, int64_t in) {
    for (int64_t column = 0; column < out; column++) {
        float most = 0;
        for (int64_t i = 0; i < in; i++)
            most = fmaxf(most, fabsf(load_one(weight[column * in + i])));
        scales[column] = most / 127;
    }
    for (int64_t panel = 0; panel * COLUMNS < out; panel++)
        for (int64_t i = 0; i < in; i++)
            for (int64_t column = panel * COLUMNS; column < (panel + 1) * COLUMNS; column++)
                *panels++ = column < out && scales[column] > 0
                                ? (int8_t)lrintf(load_one(weight[column * in + i]) / scales[column])
                                : 0;
}

/* x [rows, in] times one panel -> out [rows, width] with `stride` elements between rows. */
INLINE void multiply_rough(const float *x, const int8_t *panel, const float *scales, int64_t in, element *out,
                           int64_t stride, int64_t width, const int rows) {
    floats sums[ROUGH_ROWS][2];
    for (int row = 0; row < rows; row++)
        sums[row][0] = sums[row][1] = splat(0);
    for (int64_t i = 0; i < in; i++, panel += COLUMNS) {
        __builtin_prefetch(panel + 2 * AHEAD);
        const floats left = load_rough(panel), right = load_rough(panel + LANES);
        for (int row = 0; row < rows; row++) {
            const floats value = splat(x[row * in + i]);
            sums[row][0] = multiply_add(left, value, sums[row][0]);
            sums[row][1] = multiply_add(right, value, sums[row][1]);
        }
    }
    for (int row = 0; row < rows; row++) {
        element filled[COLUMNS];
        element *own = out + row * stride, *to = width == COLUMNS ? own : filled;
        for (int half = 0; half < 2; half++) {
            floats scale;
            memcpy(&scale, scales + half * LANES, sizeof scale);
            store(to + half * LANES, sums[row][half] * scale);
        }
        if (to == filled)
            memcpy(own, filled, width * sizeof *own);
    }
}

/* A worker's part of x [rows, in] -> out [rows, out]. */
static void multiply_rough_share(const Rough *rough, const float *x, element *out, int64_t rows, Team *team,
                                 int worker) {
    const int64_t panels = (rough->out + COLUMNS - 1) / COLUMNS, in = rough->in;
    for (int64_t panel = share(panels, team, worker); panel < share(panels, team, worker + 1); panel++) {
        const int64_t column = panel * COLUMNS;
        const int64_t width = rough->out - column < COLUMNS ? rough->out - column : COLUMNS;
        const int8_t *weights = rough->panels + column * in;
        const float *scales = rough->scales + column;
        const int64_t blocks = (rows + ROUGH_ROWS - 1) / ROUGH_ROWS;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t row = rows * block / blocks;
            const float *from = x + row * in;
            element *to = out + row * rough->out + column;
#define OF(count) \
    case count: \
        multiply_rough(from, weights, scales, in, to, rough->out, width, count); \
        break;
            switch (rows * (block + 1) / blocks - row) { OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) }
#undef OF
        }
    }
}

#endif
