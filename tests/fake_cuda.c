/* A CUDA runtime without a GPU, loaded before the real one by test_fake_cuda.py. Device memory is the host's, kernels
 * compute nothing, and what copies to the host brings are zeros (of one byte: 1, which is true). It counts what CUDA forbids
 * while a graph is captured and what makes the host wait. It cannot judge numbers, races or speed.
 *
 * Functions that need only succeed are not here: the test makes them, by the names that torch asks for. */
#define _GNU_SOURCE
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ROOM ((size_t)1 << 36) /* of addresses, of which pages are taken when they are written to */
#define MEMORY ((size_t)8 << 30)

/* For the test to read. */
struct {
    long violations, waits, graphs, flash;
    char first[120];
} fake_counts;

static void violation(const char *what) {
    if (!fake_counts.violations++)
        snprintf(fake_counts.first, sizeof fake_counts.first, "%s", what);
}

static cudaStream_t captured; /* one at a time */
static size_t nodes;
static _Thread_local enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
static _Thread_local bool capturing;

/* What may not be called by a thread that captures. */
static void unsafe(const char *what) {
    if (capturing && mode != cudaStreamCaptureModeRelaxed)
        violation(what);
}

static void work(cudaStream_t stream) { nodes += captured && stream == captured; }

typedef struct {
    char *start, *next;
} Arena;
static Arena device, pinned;

static void *take(Arena *arena, size_t size) {
    if (!arena->start)
        arena->next = arena->start = mmap(NULL, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *taken = arena->next;
    arena->next += (size + 511) / 512 * 512;
    return taken;
}

static bool in(const Arena *arena, const void *at) {
    return arena->start && (char *)at >= arena->start && (char *)at < arena->next;
}

cudaError_t cudaMalloc(void **at, size_t size) {
    unsafe("cudaMalloc");
    *at = take(&device, size);
    return 0;
}
cudaError_t cudaFree(void *at) {
    if (at)
        unsafe("cudaFree");
    return 0;
}
cudaError_t cudaHostAlloc(void **at, size_t size, unsigned flags) {
    unsafe("cudaHostAlloc");
    *at = take(&pinned, size);
    return 0;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = *total = MEMORY;
    return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *to, const void *at) {
    memset(to, 0, sizeof *to);
    to->type = in(&device, at) ? cudaMemoryTypeDevice : in(&pinned, at) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    to->devicePointer = to->hostPointer = (void *)at;
    return 0;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    const bool pageable = !(in(&device, to) || in(&pinned, to)) || !(in(&device, from) || in(&pinned, from));
    work(stream);
    fake_counts.waits += pageable;
    if (pageable && captured && stream == captured)
        violation("copy of pageable memory");
    if (in(&device, from) && !in(&device, to))
        memset(to, size == 1, size);
    else
        memmove(to, from, size);
    return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    unsafe("cudaMemcpy");
    return cudaMemcpyAsync(to, from, size, kind, NULL);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    unsafe("cudaStreamSynchronize");
    fake_counts.waits++;
    return 0;
}
cudaError_t cudaDeviceSynchronize(void) {
    unsafe("cudaDeviceSynchronize");
    fake_counts.waits++;
    return 0;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { /* where the engine means to wait */
    unsafe("cudaEventSynchronize");
    return 0;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = malloc(1);
    return 0;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = malloc(1);
    return 0;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = 1;
    return 0;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *other) {
    const enum cudaStreamCaptureMode before = mode;
    mode = *other;
    *other = before;
    return 0;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode how) {
    if (!stream || captured)
        violation("capture of the default stream, or of a second one");
    captured = stream;
    nodes = 0;
    capturing = how != cudaStreamCaptureModeRelaxed;
    return 0;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    captured = NULL;
    capturing = false;
    *graph = malloc(1);
    return 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = captured && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **on, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    cudaStreamIsCapturing(stream, status);
    if (id)
        *id = 1;
    if (graph)
        *graph = NULL;
    if (on)
        *on = NULL;
    if (edges)
        *edges = NULL;
    if (count)
        *count = 0;
    return 0;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *some, size_t *count) {
    *count = nodes;
    return 0;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = malloc(1);
    return 0;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(made, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    fake_counts.graphs++;
    return 0;
}

/* Kernels. Which of them are FlashAttention's, their names tell. */
static const void **flashes;
static size_t known;

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFunction(void **handle, const char *function, char *on_device, const char *name, int limit, void *tid,
                            void *bid, void *block, void *grid, int *size) {
    if (strstr(name, "flash_fwd")) {
        flashes = realloc(flashes, (known + 1) * sizeof *flashes);
        flashes[known++] = function;
    }
}
static _Thread_local struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} call;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    call.grid = grid, call.block = block, call.shared = shared, call.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = call.grid, *block = call.block, *shared = call.shared, *(void **)stream = call.stream;
    return 0;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return 0;
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    for (size_t i = 0; i < known; i++)
        fake_counts.flash += flashes[i] == function;
    work(stream);
    return 0;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return cudaLaunchKernel((const void *)kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *function, void **arguments) {
    return cudaLaunchKernel(function, how->gridDim, how->blockDim, arguments, how->dynamicSmemBytes, how->stream);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int size, size_t shared) {
    *blocks = 4;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size,
                                                                   size_t shared, unsigned flags) {
    *blocks = 4;
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *to, const void *function) {
    *to = (struct cudaFuncAttributes){.ptxVersion = 90, .binaryVersion = 90, .numRegs = 32, .maxThreadsPerBlock = 1024};
    return 0;
}

/* A processor of the kind that is wanted: Hopper. */
cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return 0;
}
cudaError_t cudaGetDevice(int *number) {
    *number = 0;
    return 0;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *to, int number) {
    *to = (struct cudaDeviceProp){.name = "no GPU", .major = 9, .multiProcessorCount = 132, .totalGlobalMem = MEMORY};
    to->warpSize = 32, to->maxThreadsPerBlock = 1024, to->maxThreadsPerMultiProcessor = 2048;
    to->maxThreadsDim[0] = to->maxThreadsDim[1] = 1024, to->maxThreadsDim[2] = 64;
    to->maxGridSize[0] = 2147483647, to->maxGridSize[1] = to->maxGridSize[2] = 65535;
    to->sharedMemPerBlock = 49152, to->sharedMemPerBlockOptin = 232448, to->sharedMemPerMultiprocessor = 233472;
    to->regsPerBlock = to->regsPerMultiprocessor = 65536, to->l2CacheSize = 60 << 20, to->maxBlocksPerMultiProcessor = 32;
    return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int number) {
    struct cudaDeviceProp all;
    cudaGetDeviceProperties(&all, number);
    switch ((int)which) {
#define ATTRIBUTE(name, own) \
    case cudaDevAttr##name: *value = (int)all.own; break;
        ATTRIBUTE(MultiProcessorCount, multiProcessorCount)
        ATTRIBUTE(ComputeCapabilityMajor, major)
        ATTRIBUTE(MaxSharedMemoryPerBlock, sharedMemPerBlock)
        ATTRIBUTE(MaxSharedMemoryPerBlockOptin, sharedMemPerBlockOptin)
        ATTRIBUTE(MaxSharedMemoryPerMultiprocessor, sharedMemPerMultiprocessor)
        ATTRIBUTE(WarpSize, warpSize)
        ATTRIBUTE(MaxThreadsPerBlock, maxThreadsPerBlock)
        ATTRIBUTE(MaxThreadsPerMultiProcessor, maxThreadsPerMultiProcessor)
        ATTRIBUTE(MaxGridDimX, maxGridSize[0])
        ATTRIBUTE(MaxGridDimY, maxGridSize[1])
        ATTRIBUTE(MaxRegistersPerBlock, regsPerBlock)
        ATTRIBUTE(MaxRegistersPerMultiprocessor, regsPerMultiprocessor)
        ATTRIBUTE(L2CacheSize, l2CacheSize)
    default: *value = 0;
    }
    return 0;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return 0;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) {
    *least = 0, *most = -5;
    return 0;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int number, int other) {
    *can = 0;
    return 0;
}
const char *cudaGetErrorString(cudaError_t error) { return "an error"; }
const char *cudaGetErrorName(cudaError_t error) { return "an error"; }

static int succeed(void) { return 0; }
int cuDevicePrimaryCtxGetState(int number, unsigned *flags, int *active) {
    *active = 1;
    return 0;
}
int cuCtxGetCurrent(void **context) {
    static int own;
    *context = &own;
    return 0;
}
int cuCtxSetCurrent(void *context) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int number) { return cuCtxGetCurrent(context); }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
    *function = !strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)cuDevicePrimaryCtxGetState
                : !strcmp(name, "cuCtxGetCurrent")          ? (void *)cuCtxGetCurrent
                                                            : (void *)succeed;
    if (found)
        *found = cudaDriverEntryPointSuccess;
    return 0;
}

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    *handle = malloc(1);
    return 0;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t what, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t how, int most,
                                              cublasLtMatmulHeuristicResult_t *found, int *count) {
    memset(found, 0, sizeof *found);
    *count = 1;
    return 0;
}
