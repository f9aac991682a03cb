/* A thread pool for each calling thread: all of its threads run one function, and meet at barriers. */
#ifndef THREAD_POOL_H
#define THREAD_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include "vectors.h"

/* The caller and its helper threads. Helpers spin between calls, and sleep when no call follows for 1 to 2 ms. */
typedef struct ThreadPool {
    int count; /* threads, the caller included; fewer than `asked` where the system gives no more */
    int asked;
    pid_t process;
    atomic_int arrived;
    atomic_uint round, job;
    bool over;
    pthread_mutex_t mutex;
    pthread_cond_t begin;
    void (*work)(void *task, struct ThreadPool *pool, int worker);
    void *task;
    pthread_t helpers[];
} ThreadPool;

#define SPINS_BEFORE_YIELD 2000 /* some 50 microseconds; a thread that waits longer lets others have its core */
/* Of a helper: 1 to 2 ms on an idle core, longer than between two calls of a step, since waking up takes as long as a short
 * call. */
#define SPINS_BEFORE_SLEEP (SPINS_BEFORE_YIELD + 3000)

INLINE void pause_briefly(int spins) {
    if (spins >= SPINS_BEFORE_YIELD)
        sched_yield();
#ifdef __x86_64__
    else
        __builtin_ia32_pause();
#endif
}

/* Wait until all threads of the pool are here. */
static void barrier(ThreadPool *pool) {
    if (pool->count == 1)
        return;
    unsigned round = atomic_load(&pool->round);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 == pool->count) {
        atomic_store(&pool->arrived, 0);
        atomic_fetch_add(&pool->round, 1);
        return;
    }
    for (int spins = 0; atomic_load(&pool->round) == round; spins++)
        pause_briefly(spins);
}

typedef struct {
    ThreadPool *pool;
    int worker;
} Helper;

static void *run_helper(void *argument) {
    const Helper own = *(Helper *)argument;
    ThreadPool *pool = own.pool;
    free(argument);
    for (unsigned done = 0;; done++) {
        for (int spins = 0; spins < SPINS_BEFORE_SLEEP && atomic_load(&pool->job) == done; spins++)
            pause_briefly(spins);
        pthread_mutex_lock(&pool->mutex);
        while (atomic_load(&pool->job) == done)
            pthread_cond_wait(&pool->begin, &pool->mutex);
        const bool over = pool->over;
        pthread_mutex_unlock(&pool->mutex);
        if (over)
            return NULL;
        pool->work(pool->task, pool, own.worker);
        barrier(pool);
    }
}

static void start(ThreadPool *pool, bool over) {
    pthread_mutex_lock(&pool->mutex);
    pool->over = over;
    atomic_fetch_add(&pool->job, 1);
    pthread_cond_broadcast(&pool->begin);
    pthread_mutex_unlock(&pool->mutex);
}

static void close_pool(void *argument) {
    ThreadPool *pool = argument;
    if (pool->process == getpid()) { /* a forked process has no helper threads */
        start(pool, true);
        for (int i = 0; i < pool->count - 1; i++)
            pthread_join(pool->helpers[i], NULL);
    }
    free(pool);
}

static pthread_key_t pool_key;
static pthread_once_t pool_key_once = PTHREAD_ONCE_INIT;

static void make_pool_key(void) { pthread_key_create(&pool_key, close_pool); }

/* The calling thread's pool of `count` threads, or as many as the system gives; NULL when memory is out. */
static ThreadPool *pool_of(int count) {
    pthread_once(&pool_key_once, make_pool_key);
    ThreadPool *pool = pthread_getspecific(pool_key);
    if (pool && pool->asked == count && pool->process == getpid())
        return pool;
    if (pool)
        close_pool(pool);
    pool = calloc(1, sizeof *pool + (count - 1) * sizeof *pool->helpers);
    pthread_setspecific(pool_key, pool);
    if (!pool)
        return NULL;
    *pool = (ThreadPool){.count = 1, .asked = count, .process = getpid()};
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->begin, NULL);
    for (int worker = 1; worker < count; worker++) {
        Helper *helper = malloc(sizeof *helper);
        if (!helper)
            break;
        *helper = (Helper){pool, worker};
        if (pthread_create(&pool->helpers[worker - 1], NULL, run_helper, helper)) {
            free(helper);
            break;
        }
        pool->count++;
    }
    return pool;
}

/* Run work(task, pool, worker) on `count` threads, the caller being worker 0. Returns 0, or 1 when memory is out. */
static int parallel_for(int count, void (*work)(void *, ThreadPool *, int), void *task) {
    ThreadPool *pool = pool_of(count);
    if (!pool)
        return 1;
    pool->work = work;
    pool->task = task;
    if (pool->count > 1)
        start(pool, false);
    work(task, pool, 0);
    barrier(pool);
    return 0;
}

/* A worker's chunk of `size` things begins here and ends where the next worker's begins. */
INLINE int64_t chunk_begin(int64_t size, const ThreadPool *pool, int worker) { return size * worker / pool->count; }

#endif
