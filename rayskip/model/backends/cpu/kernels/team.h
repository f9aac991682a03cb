/* Threads that share the work of one call. */
#ifndef TEAM_H
#define TEAM_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include "vectors.h"

/* Threads that work on one call: the caller and its helpers, which fall asleep where no other call follows soon. */
typedef struct Team {
    int count; /* the caller included; fewer than `asked` where the system gives no more threads */
    int asked;
    pid_t process;
    atomic_int arrived;
    atomic_uint round, job;
    bool over;
    pthread_mutex_t mutex;
    pthread_cond_t begin;
    void (*work)(void *task, struct Team *team, int worker);
    void *task;
    pthread_t helpers[];
} Team;

#define SPINS 2000           /* some 50 microseconds; who waits longer lets other threads run */
#define AWAKE (SPINS + 3000) /* a helper's turns before it sleeps, 1 to 2 ms on an idle core: longer than between a step's
                                calls, of which the short ones take no longer than waking up */

INLINE void pause_briefly(int spins) {
    if (spins >= SPINS)
        sched_yield();
#ifdef __x86_64__
    else
        __builtin_ia32_pause();
#endif
}

/* Wait for all workers to come here. */
static void meet(Team *team) {
    if (team->count == 1)
        return;
    unsigned round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->count) {
        atomic_store(&team->arrived, 0);
        atomic_fetch_add(&team->round, 1);
        return;
    }
    for (int spins = 0; atomic_load(&team->round) == round; spins++)
        pause_briefly(spins);
}

typedef struct {
    Team *team;
    int worker;
} Helper;

static void *help(void *argument) {
    const Helper own = *(Helper *)argument;
    Team *team = own.team;
    free(argument);
    for (unsigned done = 0;; done++) {
        for (int spins = 0; spins < AWAKE && atomic_load(&team->job) == done; spins++)
            pause_briefly(spins);
        pthread_mutex_lock(&team->mutex);
        while (atomic_load(&team->job) == done)
            pthread_cond_wait(&team->begin, &team->mutex);
        const bool over = team->over;
        pthread_mutex_unlock(&team->mutex);
        if (over)
            return NULL;
        team->work(team->task, team, own.worker);
        meet(team);
    }
}

static void start(Team *team, bool over) {
    pthread_mutex_lock(&team->mutex);
    team->over = over;
    atomic_fetch_add(&team->job, 1);
    pthread_cond_broadcast(&team->begin);
    pthread_mutex_unlock(&team->mutex);
}

static void disband(void *argument) {
    Team *team = argument;
    if (team->process == getpid()) { /* a fork has no helpers */
        start(team, true);
        for (int i = 0; i < team->count - 1; i++)
            pthread_join(team->helpers[i], NULL);
    }
    free(team);
}

static pthread_key_t own_team;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_key(void) { pthread_key_create(&own_team, disband); }

/* The calling thread's team of `count`, as far as the system gives threads; NULL: no memory. */
static Team *team_of(int count) {
    pthread_once(&once, make_key);
    Team *team = pthread_getspecific(own_team);
    if (team && team->asked == count && team->process == getpid())
        return team;
    if (team)
        disband(team);
    team = calloc(1, sizeof *team + (count - 1) * sizeof *team->helpers);
    pthread_setspecific(own_team, team);
    if (!team)
        return NULL;
    *team = (Team){.count = 1, .asked = count, .process = getpid()};
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->begin, NULL);
    for (int worker = 1; worker < count; worker++) {
        Helper *helper = malloc(sizeof *helper);
        if (!helper)
            break;
        *helper = (Helper){team, worker};
        if (pthread_create(&team->helpers[worker - 1], NULL, help, helper)) {
            free(helper);
            break;
        }
        team->count++;
    }
    return team;
}

/* Have `count` threads work on the task. Returns 0, or 1 when memory is out. */
static int together(int count, void (*work)(void *, Team *, int), void *task) {
    Team *team = team_of(count);
    if (!team)
        return 1;
    team->work = work;
    team->task = task;
    if (team->count > 1)
        start(team, false);
    work(task, team, 0);
    meet(team);
    return 0;
}

/* A worker's part of `size` things: from share(size, team, worker) to the next worker's. */
INLINE int64_t share(int64_t size, const Team *team, int worker) { return size * worker / team->count; }

#endif
