/* threads.c - a pool of POSIX threads that run one task together.
 *
 * A run publishes the task and raises `generation`. Workers watch it, first spinning for some microseconds (the second
 * operation of a layer follows the first at once), then asleep on a condition variable. The last to finish wakes the
 * caller, which waits in the same way. A second caller meanwhile finds `busy` locked and works alone.
 *
 * Tasks run in the default floating-point environment, whatever the caller's is (a process may have set flush-to-zero):
 * the bits shall not depend on it. */
#include "check.h"
#include "cpu.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

struct wd_threads {
  pthread_mutex_t busy; /* held by the caller of a run, from its begin to its end */

  pthread_mutex_t mutex; /* guards sleeping and waking, that is, changes of generation, stop and running's zero */
  pthread_cond_t wake;   /* generation has risen, or stop */
  pthread_cond_t done;   /* running is zero */
  atomic_uint generation;
  atomic_int running; /* workers that have not finished this generation */
  atomic_int stop;

  wd_task *task; /* written before generation rises, read after */
  void *context;

  int32_t count;   /* threads that share the work, the caller included */
  int32_t started; /* workers that exist; count - 1 once created */
  struct worker {
    pthread_t thread;
    struct wd_threads *pool;
    int32_t index;
  } workers[];
};

enum { SPINS = 2000 }; /* some 20 to 80 us of pauses, by processor */

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void run_task(wd_task *task, void *context, int32_t worker, int32_t workers) {
  fenv_t environment;
  fegetenv(&environment);
  fesetenv(FE_DFL_ENV);
  task(context, worker, workers);
  fesetenv(&environment);
}

/* Returns when generation differs from `seen`, or on stop. */
static void await_generation(wd_threads *pool, unsigned seen) {
  for (int spin = 0; spin < SPINS; spin++) {
    if (atomic_load_explicit(&pool->generation, memory_order_acquire) != seen) return;
    pause_briefly();
  }
  pthread_mutex_lock(&pool->mutex);
  while (atomic_load(&pool->generation) == seen && !atomic_load(&pool->stop))
    pthread_cond_wait(&pool->wake, &pool->mutex);
  pthread_mutex_unlock(&pool->mutex);
}

static void await_zero(wd_threads *pool) {
  for (int spin = 0; spin < SPINS; spin++) {
    if (atomic_load_explicit(&pool->running, memory_order_acquire) == 0) return;
    pause_briefly();
  }
  pthread_mutex_lock(&pool->mutex);
  while (atomic_load(&pool->running) != 0)
    pthread_cond_wait(&pool->done, &pool->mutex);
  pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *argument) {
  const struct worker *const worker = argument;
  wd_threads *const pool = worker->pool;
  for (unsigned seen = 0;; seen++) {
    await_generation(pool, seen);
    if (atomic_load(&pool->stop)) return NULL;
    run_task(pool->task, pool->context, worker->index, pool->count);
    if (atomic_fetch_sub(&pool->running, 1) == 1) {
      pthread_mutex_lock(&pool->mutex);
      pthread_cond_signal(&pool->done);
      pthread_mutex_unlock(&pool->mutex);
    }
  }
}

void wd_threads_run(wd_threads *threads, wd_task *task, void *context) {
  if (threads == NULL || threads->started == 0 || pthread_mutex_trylock(&threads->busy) != 0) {
    run_task(task, context, 0, 1);
    return;
  }
  int cancelable; /* a caller that were cancelled while it waits would leave the workers its stack, and the locks */
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancelable);
  threads->task = task;
  threads->context = context;
  atomic_store(&threads->running, threads->started);
  pthread_mutex_lock(&threads->mutex);
  atomic_fetch_add(&threads->generation, 1);
  pthread_cond_broadcast(&threads->wake);
  pthread_mutex_unlock(&threads->mutex);
  run_task(task, context, 0, threads->count);
  await_zero(threads);
  pthread_mutex_unlock(&threads->busy);
  pthread_setcancelstate(cancelable, &cancelable);
}

/* The pool's locks; 0, or the error of the one that failed. */
static int make_locks(wd_threads *pool) {
  int error = pthread_mutex_init(&pool->busy, NULL);
  if (error == 0) error = pthread_mutex_init(&pool->mutex, NULL);
  if (error == 0) error = pthread_cond_init(&pool->wake, NULL);
  if (error == 0) error = pthread_cond_init(&pool->done, NULL);
  return error;
}

/* Starts count - 1 workers; 0, or the error of the one that failed. The process' signals are not theirs: a thread
 * starts with the mask of the one that creates it. */
static int start_workers(wd_threads *pool) {
  sigset_t all, own;
  sigfillset(&all);
  int error = pthread_sigmask(SIG_SETMASK, &all, &own);
  if (error != 0) return error;
  while (error == 0 && pool->started < pool->count - 1) {
    struct worker *const worker = &pool->workers[pool->started];
    worker->pool = pool;
    worker->index = pool->started + 1;
    error = pthread_create(&worker->thread, NULL, worker_main, worker);
    pool->started += error == 0;
  }
  const int restored = pthread_sigmask(SIG_SETMASK, &own, NULL);
  return error != 0 ? error : restored;
}

wd_status wd_threads_create(int32_t count, wd_threads **threads) {
  WD_CHECK(threads != NULL, WD_INVALID_ARGUMENT, "threads: was NULL, expected a place for the pool");
  *threads = NULL;
  WD_CHECK(count >= 1, WD_INVALID_ARGUMENT, "count: was %d, expected 1 (the caller alone) or more", (int)count);
  wd_threads *const pool = calloc(1, sizeof *pool + ((size_t)count - 1) * sizeof pool->workers[0]);
  WD_CHECK(pool != NULL, WD_OUT_OF_MEMORY, "count: was %d, expected a pool that there is memory for", (int)count);
  pool->count = count;
  int error = make_locks(pool);
  if (error != 0) {
    free(pool); /* those that were made hold nothing */
    return wd_fail(WD_OUT_OF_MEMORY, "count: was %d, and the system gave no lock for the pool (error %d)", (int)count,
                   error);
  }
  error = start_workers(pool);
  if (error != 0) {
    const int32_t started = pool->started;
    wd_threads_destroy(pool);
    return wd_fail(WD_OUT_OF_MEMORY, "count: was %d, and the system gave %d threads beside the caller (error %d)",
                   (int)count, (int)started, error);
  }
  *threads = pool;
  return WD_OK;
}

void wd_threads_destroy(wd_threads *threads) {
  if (threads == NULL) return;
  pthread_mutex_lock(&threads->mutex);
  atomic_store(&threads->stop, 1);
  pthread_cond_broadcast(&threads->wake);
  pthread_mutex_unlock(&threads->mutex);
  for (int32_t i = 0; i < threads->started; i++)
    pthread_join(threads->workers[i].thread, NULL);
  pthread_cond_destroy(&threads->done);
  pthread_cond_destroy(&threads->wake);
  pthread_mutex_destroy(&threads->mutex);
  pthread_mutex_destroy(&threads->busy);
  free(threads);
}
