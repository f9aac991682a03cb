/* CPU kernels of the forward: everything but the matrix products. See native.py for the calls.
 *
 * Each row of each function is computed alone, in an order that nothing but the row decides, so results never
 * depend on batch mates. Sums run in float32; results are rounded once.
 *
 * Compiled per element type: with -DBF16 elements are bfloat16, else float32. Vectors are the compiler's own
 * (GCC and Clang), so the same source serves AVX-512, AVX2 and NEON.
 *
 * Shapes: N tokens, H query heads, K key-value heads, G = H / K, D head dim, T positions per cache slot.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define KEYS_AHEAD 24 /* prefetched: the processor's own prefetch ends with each page */
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

#ifdef BF16
typedef uint16_t element;

INLINE floats load(const element *from) {
    halves narrow;
    memcpy(&narrow, from, sizeof narrow);
    return (floats)(__builtin_convertvector(narrow, bits) << 16);
}

/* Round to nearest even; NaN stays NaN. */
INLINE void store(element *to, floats x) {
    bits raw = (bits)x;
    bits rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
    bits is_nan = (bits)(x != x);
    halves narrow = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), halves);
    memcpy(to, &narrow, sizeof narrow);
}

INLINE float load_one(element from) {
    uint32_t raw = (uint32_t)from << 16;
    float x;
    memcpy(&x, &raw, sizeof x);
    return x;
}

INLINE element round_one(float x) {
    uint32_t raw;
    memcpy(&raw, &x, sizeof raw);
    return x != x ? 0x7fc0 : (element)((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);
}
#else
typedef float element;

INLINE floats load(const element *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(element *to, floats x) { memcpy(to, &x, sizeof x); }
INLINE float load_one(element from) { return from; }
INLINE element round_one(float x) { return x; }
#endif

INLINE floats splat(float x) { return x - (floats){0}; }
INLINE floats pick(ints where, floats yes, floats no) {
    return (floats)((where & (ints)yes) | (~where & (ints)no));
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* Neighbours summed: lanes 0..7 from a, 8..15 from b. */
INLINE floats pair_sums(floats a, floats b) {
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* Lane i of the result is the sum over all lanes of x[i]; x is used up. */
INLINE floats lane_sums(floats x[LANES]) {
    for (int width = LANES; width > 1; width /= 2)
        for (int i = 0; i < width / 2; i++)
            x[i] = pair_sums(x[2 * i], x[2 * i + 1]);
    return x[0];
}

INLINE float sum(floats x) {
    for (int i = 0; i < 4; i++)
        x = pair_sums(x, x);
    return x[0];
}

INLINE float maximum(floats x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++)
        best = x[i] > best ? x[i] : best;
    return best;
}

/* e^x for |x| up to 87, beyond it e^87 or e^-87; relative error below 3e-7 (Cephes' polynomial). */
INLINE floats exponential(floats x) {
    const floats magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = pick(x < -87.0f, splat(-87.0f), pick(x > 87.0f, splat(87.0f), x));
    floats shifted = x * 1.44269504f + magic;
    floats power = shifted - magic;
    floats r = x - power * 0.693359375f + power * 2.12194440e-4f;
    floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (floats)((bits)p + ((bits)shifted << 23));
}

/* x [rows, width] += branch (NULL: nothing), rounded; out = RMSNorm(x) * weight. width: a multiple of LANES. */
void add_rms_norm(element *x, const element *branch, const element *weight, element *out, int64_t rows,
                  int64_t width, float eps) {
    for (int64_t row = 0; row < rows; row++, x += width, out += width) {
        floats squares = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            if (branch)
                store(x + i, load(x + i) + load(branch + row * width + i));
            floats value = load(x + i);
            squares += value * value;
        }
        float scale = 1.0f / sqrtf(sum(squares) / (float)width + eps);
        for (int64_t i = 0; i < width; i += LANES)
            store(out + i, load(x + i) * scale * load(weight + i));
    }
}

/* out [rows, width] = silu(up[:, :width]) * up[:, width:]. width: a multiple of LANES. */
void silu_gate(const element *up, element *out, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++, up += 2 * width, out += width)
        for (int64_t i = 0; i < width; i += LANES) {
            floats gate = load(up + i);
            store(out + i, gate / (1.0f + exponential(-gate)) * load(up + width + i));
        }
}

typedef struct {
    int64_t heads, kv_heads, dim; /* H, K, D */
    int64_t length;               /* T */
    int64_t window;               /* positions seen, the query's own included; 0: all */
    float scale;                  /* of q.k */
    float softcap;                /* on the scores; 0: none */
} Shape;

/* Rotary embedding of the first `turned` dims of one head, halves layout. */
INLINE void rotate(const element *x, element *out, const element *cosines, const element *sines, int64_t turned) {
    int64_t half = turned / 2;
    for (int64_t i = 0; i < half; i++) {
        float left = load_one(x[i]), right = load_one(x[i + half]);
        out[i] = round_one(left * load_one(cosines[i]) - right * load_one(sines[i]));
        out[i + half] = round_one(right * load_one(cosines[i + half]) + left * load_one(sines[i + half]));
    }
}

/* Turns q [N, H, D] in place; turns k [N, K, D] and stores it with v [N, K, D] in one layer of the cache, at
 * `places` [N]. stride: elements from one token to the next in q, k and v. cosines, sines: [positions, turned]. */
void rotate_and_store(const Shape *shape, element *q, element *k, const element *v, const int64_t stride[3],
                      const element *cosines, const element *sines, int64_t turned, const int64_t *slots,
                      const int64_t *positions, const int64_t *places, element *keys, element *values,
                      int64_t tokens) {
    const int64_t dim = shape->dim;
    for (int64_t token = 0; token < tokens; token++) {
        const element *cosine = cosines + positions[token] * turned, *sine = sines + positions[token] * turned;
        element *q_row = q + token * stride[0], *k_row = k + token * stride[1];
        if (turned) {
            for (int64_t head = 0; head < shape->heads; head++)
                rotate(q_row + head * dim, q_row + head * dim, cosine, sine, turned);
            for (int64_t head = 0; head < shape->kv_heads; head++)
                rotate(k_row + head * dim, k_row + head * dim, cosine, sine, turned);
        }
        for (int64_t head = 0; head < shape->kv_heads; head++) {
            int64_t place = ((slots[token] * shape->kv_heads + head) * shape->length + places[token]) * dim;
            memcpy(keys + place, k_row + head * dim, dim * sizeof *keys);
            memcpy(values + place, v + token * stride[2] + head * dim, dim * sizeof *values);
        }
    }
}

/* Where the keys of one token's positions lie: below `start` at the position itself, from there on at `after`. */
typedef struct {
    int64_t start, last;
    const int64_t *after;
} Path;

INLINE int64_t place_of(const Path *path, int64_t position) {
    return position < path->start || position >= path->last ? position : path->after[position - path->start];
}

/* Scores of `count` query heads of one token against keys [first, last); first is a multiple of LANES, reads run
 * to the next multiple past last. scores [count, room] begin at key `from`. */
INLINE void score(const element *q, const element *keys, float *scores, int64_t room, int64_t from, int64_t first,
                  int64_t last, const Path *path, const int count, const int64_t dim, float scale) {
    for (int64_t block = first; block < last; block += LANES) {
        floats partial[4][LANES];
        for (int key = 0; key < LANES; key++) {
            const element *k = keys + (path ? place_of(path, block + key) : block + key) * dim;
            for (int64_t i = 0; i < dim; i += 2 * LANES)
                __builtin_prefetch(k + KEYS_AHEAD * dim + i);
            for (int head = 0; head < count; head++)
                partial[head][key] = (floats){0};
            for (int64_t i = 0; i < dim; i += LANES) {
                floats part = load(k + i);
                for (int head = 0; head < count; head++)
                    partial[head][key] += load(q + head * dim + i) * part;
            }
        }
        for (int head = 0; head < count; head++) {
            floats total = lane_sums(partial[head]) * scale;
            memcpy(scores + head * room + (block - from), &total, sizeof total);
        }
    }
}

/* Softmax weights in place of scores [first, last), not yet divided by their sum, which is returned. Those of keys
 * before `visible` become 0. */
INLINE float weigh(float *scores, int64_t first, int64_t visible, int64_t last, float softcap) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t size = last - first;
    floats best = splat(-INFINITY), total = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        floats x;
        memcpy(&x, scores + i, sizeof x);
        if (softcap > 0)
            x = softcap - 2.0f * softcap / (exponential(2.0f / softcap * x) + 1.0f);
        ints hidden = (lane + (int32_t)i >= (int32_t)size) | (lane + (int32_t)i < (int32_t)(visible - first));
        x = pick(hidden, splat(-INFINITY), x);
        best = pick(x > best, x, best);
        memcpy(scores + i, &x, sizeof x);
    }
    float most = maximum(best);
    for (int64_t i = 0; i < size; i += LANES) {
        floats x;
        memcpy(&x, scores + i, sizeof x);
        x = pick(x == -INFINITY, splat(0), exponential(x - most));
        total += x;
        memcpy(scores + i, &x, sizeof x);
    }
    return sum(total);
}

/* out [count, dim] = weights [count, room] over values [first, last), divided by totals. */
INLINE void mix(const float *weights, int64_t room, const element *values, int64_t first, int64_t last,
                const Path *path, const float *totals, element *out, const int count, const int64_t dim) {
    const int64_t straight = path->start < last ? path->start : last;
    for (int64_t part = 0; part < dim; part += 4 * LANES) {
        const int parts = dim - part < 4 * LANES ? (int)((dim - part) / LANES) : 4;
        floats mixed[4][4] = {0};
        for (int64_t key = first; key < straight; key++)
            for (int i = 0; i < parts; i++) {
                floats value = load(values + key * dim + part + i * LANES);
                __builtin_prefetch(values + (key + KEYS_AHEAD) * dim + part + i * LANES);
                for (int head = 0; head < count; head++)
                    mixed[head][i] += weights[head * room + key - first] * value;
            }
        for (int64_t key = first > straight ? first : straight; key < last; key++)
            for (int i = 0; i < parts; i++) {
                floats value = load(values + place_of(path, key) * dim + part + i * LANES);
                for (int head = 0; head < count; head++)
                    mixed[head][i] += weights[head * room + key - first] * value;
            }
        for (int head = 0; head < count; head++)
            for (int i = 0; i < parts; i++)
                store(out + head * dim + part + i * LANES, mixed[head][i] / totals[head]);
    }
}

INLINE void attend_heads(const Shape *shape, const element *q, const element *keys, const element *values,
                         const Path *path, float *scores, element *out, const int count, const int64_t dim) {
    const int64_t last = path->last, room = shape->length;
    const int64_t visible = shape->window && shape->window < last ? last - shape->window : 0;
    const int64_t first = visible / LANES * LANES;
    int64_t straight = path->start < last ? path->start / LANES * LANES : last;
    float totals[4];
    straight = straight < first ? first : straight;
    score(q, keys, scores, room, first, first, straight, NULL, count, dim, shape->scale);
    score(q, keys, scores, room, first, straight, last, path, count, dim, shape->scale);
    for (int head = 0; head < count; head++)
        totals[head] = weigh(scores + head * room, first, visible, last, shape->softcap);
    mix(scores, room, values, first, last, path, totals, out, count, dim);
}

/* The number of heads and, where it is a usual one, the dim are known to the compiler. */
INLINE void attend_some(const Shape *shape, const element *q, const element *keys, const element *values,
                        const Path *path, float *scores, element *out, const int count) {
    if (shape->dim == 64)
        attend_heads(shape, q, keys, values, path, scores, out, count, 64);
    else if (shape->dim == 128)
        attend_heads(shape, q, keys, values, path, scores, out, count, 128);
    else
        attend_heads(shape, q, keys, values, path, scores, out, count, shape->dim);
}

/* Causal attention of N tokens, each over its own slot's keys up to its own position: q [N, H, D] with `stride`
 * elements between tokens, keys and values [slots, K, T, D] of one layer -> out [N, H, D]. D and T: multiples of
 * LANES. starts [N], after [N, branch]: see Path; NULL where every key lies at its position. Returns 0, or 1 when
 * memory is out. */
int attend(const Shape *shape, const element *q, int64_t stride, const element *keys, const element *values,
           const int64_t *slots, const int64_t *positions, const int64_t *starts, const int64_t *after,
           int64_t branch, element *out, int64_t tokens) {
    const int64_t dim = shape->dim, shared = shape->heads / shape->kv_heads;
    float *scores = aligned_alloc(64, 4 * shape->length * sizeof *scores);
    if (!scores)
        return 1;
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t last = positions[token] + 1;
        const Path path = {starts ? starts[token] : last, last, starts ? after + token * branch : NULL};
        for (int64_t kv_head = 0; kv_head < shape->kv_heads; kv_head++) {
            int64_t place = (slots[token] * shape->kv_heads + kv_head) * shape->length * dim;
            for (int64_t head = 0; head < shared; head += 4) {
                int64_t at = (kv_head * shared + head) * dim;
                const element *query = q + token * stride + at;
                element *to = out + token * shape->heads * dim + at;
                switch (shared - head) {
                case 1:
                    attend_some(shape, query, keys + place, values + place, &path, scores, to, 1);
                    break;
                case 2:
                    attend_some(shape, query, keys + place, values + place, &path, scores, to, 2);
                    break;
                case 3:
                    attend_some(shape, query, keys + place, values + place, &path, scores, to, 3);
                    break;
                default:
                    attend_some(shape, query, keys + place, values + place, &path, scores, to, 4);
                }
            }
        }
    }
    free(scores);
    return 0;
}
