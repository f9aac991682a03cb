/* One step of Kangaroo's draft as one call: the model's first layers, the adapter, its norm, its int8 head and the top k.
 *
 * A reader may skip this file: it calls one after the other what is defined elsewhere, since each takes about as long as a
 * call from Python does.
 *
 * Included by kernels.c, whose functions and structures it uses. */
#ifndef DRAFT_H
#define DRAFT_H

/* The model's first layers run over tokens, then the adapter: `adapter` has its layer, and an x of its own that is filled
 * in. The head gives the top k tokens to follow those numbered `after` [rows]: indices and probabilities [rows, k], as
 * rayskip_top_k does. */
typedef struct {
    LayersTask *layers, *adapter;
    const element *norm;
    float eps;
    const Int8Weights *head; /* its outputs a multiple of LANES */
    const int64_t *after;
    int64_t rows, k, *indices;
    float *probabilities;
    /* scratch, filled in here: */
    element *normed, *logits;
    int16_t *quantized;
    QuantizedRow *info;
} DraftTask;

static void draft_worker(void *argument, ThreadPool *pool, int worker) {
    const DraftTask *task = argument;
    const Int8Weights *head = task->head;
    const int64_t tokens = task->layers->tokens, width = head->in, begin = chunk_begin(tokens, pool, worker) * width;
    layers_worker(task->layers, pool, worker);
    memcpy(task->adapter->x + begin, task->layers->x + begin,
           (chunk_begin(tokens, pool, worker + 1) * width - begin) * sizeof(element));
    layers_worker(task->adapter, pool, worker); /* begins with the chunk of tokens that this worker has just copied */
    if (!task->rows)
        return;
    barrier(pool);
    const int64_t from = chunk_begin(task->rows, pool, worker), to = chunk_begin(task->rows, pool, worker + 1);
    for (int64_t row = from; row < to; row++) {
        element *normed = task->normed + row * width;
        rayskip_add_rms_norm(task->adapter->x + task->after[row] * width, NULL, task->norm, normed, 1, width, width,
                             task->eps);
        quantize_rows(normed, task->quantized + row * rayskip_int8_width(width), task->info + row, 1, width);
    }
    barrier(pool);
    Int8Task product = {head, task->quantized, task->info, task->logits, task->rows};
    int8_product_worker(&product, pool, worker);
    barrier(pool);
    rayskip_top_k(task->logits + from * head->out, to - from, head->out, task->k,
                      task->indices + from * task->k, task->probabilities + from * task->k);
}

/* One step of a draft. Returns 0, or 1 when memory is out. */
int rayskip_draft(DraftTask *task) {
    const Int8Weights *head = task->head;
    char *layers = allocate_scratch(task->layers), *adapter = allocate_scratch(task->adapter);
    task->normed = malloc(task->rows * head->in * sizeof(element) + 1);
    task->logits = aligned_alloc(64, 64 + to_lines(task->rows * head->out * (int64_t)sizeof(element)));
    task->quantized = malloc(task->rows * rayskip_int8_width(head->in) * sizeof *task->quantized + 1);
    task->info = malloc(task->rows * sizeof *task->info + 1);
    int failed = 1;
    if (layers && adapter && task->normed && task->logits && task->quantized && task->info)
        failed = parallel_for((int)task->layers->threads, draft_worker, task);
    free(layers);
    free(adapter);
    free(task->normed);
    free(task->logits);
    free(task->quantized);
    free(task->info);
    return failed;
}

#endif
