/* test_concurrency.c - many threads in the library at once: with no pool, with one pool for all, with a pool each; and
 * an error sentence for each thread; and pools beside what a process does with signals and cancelled threads. */
#include "call.h"
#include "harness.h"
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CALLERS = 6, ROUNDS = 12 };

/* A thread, and what it found: only the main thread counts checks. */
typedef struct {
  pthread_t thread;
  call *call;
  const void *expected;
  wd_threads *pool;
  pthread_barrier_t *start;
  int wrong_status, wrong_bits, wrong_sentences;
} caller;

static void *call_often(void *argument) {
  caller *const self = argument;
  call *const c = self->call;
  pthread_barrier_wait(self->start);
  for (int round = 0; round < ROUNDS; round++) {
    c->options.threads = self->pool;
    self->wrong_status += call_run(c, FORWARD) != WD_OK;
    self->wrong_bits += memcmp(c->tensors[OUTPUT].memory.data, self->expected, c->tensors[OUTPUT].memory.bytes) != 0;
    self->wrong_status += call_run(c, GATE_UP) != WD_OK || call_run(c, DOWN) != WD_OK;
    self->wrong_bits += memcmp(c->tensors[OUTPUT].memory.data, self->expected, c->tensors[OUTPUT].memory.bytes) != 0;
  }
  return NULL;
}

/* Each caller has states of its own and all share one layer's weights: the library only reads them. */
static void callers(kind of, int pools, const char *title) {
  static call calls[CALLERS];
  caller callers_of[CALLERS] = {0};
  void *expected[CALLERS];
  wd_threads *pool[CALLERS] = {0};
  pthread_barrier_t start;
  pthread_barrier_init(&start, NULL, CALLERS);
  sizes s = small_sizes(of);
  s.tokens = 8;
  s.hidden = 256;
  s.intermediate = 104; /* enough work to be shared by a pool */
  for (int i = 0; i < CALLERS; i++) {
    call_make(&calls[i], s, 1700 + (uint64_t)i);
    calls[i].given[GATE_UP_PROJ] = &calls[0].tensors[GATE_UP_PROJ].dl;
    calls[i].given[DOWN_PROJ] = &calls[0].tensors[DOWN_PROJ].dl;
    call_succeeds(&calls[i], FORWARD);
    expected[i] = bits_of(&calls[i].tensors[OUTPUT]);
    if (i < pools) CHECK(wd_threads_create(3, &pool[i]) == WD_OK, "pool %d: %s", i, wd_last_error());
  }
  for (int i = 0; i < CALLERS; i++) {
    callers_of[i] = (caller){
        .call = &calls[i], .expected = expected[i], .pool = pools == 0 ? NULL : pool[i % pools], .start = &start};
    CHECK(pthread_create(&callers_of[i].thread, NULL, call_often, &callers_of[i]) == 0, "thread %d", i);
  }
  for (int i = 0; i < CALLERS; i++)
    pthread_join(callers_of[i].thread, NULL);
  for (int i = 0; i < CALLERS; i++) {
    CHECK(callers_of[i].wrong_status == 0, "%s, thread %d: %d calls failed", title, i, callers_of[i].wrong_status);
    CHECK(callers_of[i].wrong_bits == 0, "%s, thread %d: %d results had other bits", title, i,
          callers_of[i].wrong_bits);
    wd_threads_destroy(pool[i]);
    free(expected[i]);
  }
  for (int i = 0; i < CALLERS; i++)
    call_free(&calls[i]);
  pthread_barrier_destroy(&start);
}

/* Provokes sentences that hold its own number, in step with the others, and finds its own each time. */
static void *fail_often(void *argument) {
  caller *const self = argument;
  char expected[128];
  self->wrong_sentences += strcmp(wd_last_error(), "") != 0; /* a new thread has had no error */
  const int number = self->wrong_bits;
  self->wrong_bits = 0;
  for (int round = 0; round < 200; round++) {
    wd_kernel_info row = {.struct_size = (size_t)(1000 * (number + 1) + round)};
    pthread_barrier_wait(self->start);
    self->wrong_status += wd_get_kernel_info(0, &row) != WD_INVALID_ARGUMENT;
    pthread_barrier_wait(self->start);
    snprintf(expected, sizeof expected, "info: struct_size was %d, expected %zu, as in the warpdecode.h of version %s",
             1000 * (number + 1) + round, sizeof row, wd_version());
    self->wrong_sentences += strcmp(wd_last_error(), expected) != 0;
  }
  return NULL;
}

static void sentences(void) {
  caller callers_of[CALLERS] = {0};
  pthread_barrier_t start;
  pthread_barrier_init(&start, NULL, CALLERS);
  (void)wd_get_build_info(NULL);
  for (int i = 0; i < CALLERS; i++) {
    callers_of[i].start = &start;
    callers_of[i].wrong_bits = i; /* its number, on the way in */
    CHECK(pthread_create(&callers_of[i].thread, NULL, fail_often, &callers_of[i]) == 0, "thread %d", i);
  }
  for (int i = 0; i < CALLERS; i++) {
    pthread_join(callers_of[i].thread, NULL);
    CHECK(callers_of[i].wrong_status == 0, "thread %d: %d calls did not fail", i, callers_of[i].wrong_status);
    CHECK(callers_of[i].wrong_sentences == 0, "thread %d: %d sentences were another thread's", i,
          callers_of[i].wrong_sentences);
  }
  CHECK(strcmp(wd_last_error(), "info: was NULL, expected a wd_build_info") == 0,
        "other threads changed the main thread's sentence to: %s", wd_last_error());
  pthread_barrier_destroy(&start);
}

/* Pools come and go while others work. */
static void *make_pools(void *argument) {
  caller *const self = argument;
  for (int round = 0; round < 20; round++) {
    wd_threads *pool = NULL;
    self->wrong_status += wd_threads_create(1 + round % 4, &pool) != WD_OK;
    wd_threads_destroy(pool);
  }
  return NULL;
}

static void pools_come_and_go(void) {
  caller callers_of[CALLERS] = {0};
  for (int i = 0; i < CALLERS; i++)
    CHECK(pthread_create(&callers_of[i].thread, NULL, make_pools, &callers_of[i]) == 0, "thread %d", i);
  for (int i = 0; i < CALLERS; i++) {
    pthread_join(callers_of[i].thread, NULL);
    CHECK(callers_of[i].wrong_status == 0, "thread %d: %d pools could not be made", i, callers_of[i].wrong_status);
  }
}

/* How many threads of this process let a signal through. */
static int threads_open_to(int number) {
  int open = 0;
  DIR *const tasks = opendir("/proc/self/task");
  for (const struct dirent *task; tasks != NULL && (task = readdir(tasks)) != NULL;) {
    char path[300], line[256];
    unsigned long long blocked = 0;
    snprintf(path, sizeof path, "/proc/self/task/%s/status", task->d_name);
    FILE *const status = task->d_name[0] != '.' ? fopen(path, "r") : NULL;
    if (status == NULL) continue;
    while (fgets(line, sizeof line, status) != NULL)
      if (sscanf(line, "SigBlk: %llx", &blocked) == 1) open += !(blocked >> (number - 1) & 1);
    fclose(status);
  }
  if (tasks != NULL) closedir(tasks);
  return open;
}

/* A pool's threads take no signal of the process, and the thread that makes the pool takes those that it took before.
 */
static void signals_stay_the_program_s(void) {
  call c;
  call_make(&c, small_sizes(BFLOAT16), 1901);
  const int before = threads_open_to(SIGTERM);
  CHECK(wd_threads_create(4, &c.options.threads) == WD_OK, "a pool: %s", wd_last_error());
  call_succeeds(&c, FORWARD); /* which all its threads have taken part in: they have begun */
  CHECK(before >= 1 && threads_open_to(SIGTERM) == before, "%d threads take SIGTERM, before the pool %d",
        threads_open_to(SIGTERM), before);
  wd_threads_destroy(c.options.threads);
  call_free(&c);
}

static void *call_until_cancelled(void *argument) {
  caller *const self = argument;
  for (int round = 0;; round++) {
    (void)call_rerun(self->call, FORWARD);
    if (round == 0) pthread_barrier_wait(self->start);
    pthread_testcancel();
  }
  return NULL;
}

/* A thread that is cancelled in a call ends behind it: the pool can be used, and destroyed. */
static void cancelled_callers(void) {
  enum { TIMES = 40 };
  wd_threads *pool = NULL;
  pthread_barrier_t start;
  call c;
  sizes s = small_sizes(BFLOAT16);
  s.tokens = 16;
  s.hidden = 256;
  s.intermediate = 512; /* so much work that a caller which is done with its share sleeps until the others are */
  call_make(&c, s, 1900);
  call_succeeds(&c, FORWARD);
  void *const expected = bits_of(&c.tensors[OUTPUT]);
  CHECK(wd_threads_create(3, &pool) == WD_OK, "a pool: %s", wd_last_error());
  c.options.threads = pool;
  pthread_barrier_init(&start, NULL, 2);
  for (int i = 0; i < TIMES; i++) {
    caller self = {.call = &c, .start = &start};
    void *result = NULL;
    harness_doing("cancelling the caller of a pool, for the %dth time", i);
    CHECK(pthread_create(&self.thread, NULL, call_until_cancelled, &self) == 0, "thread %d", i);
    pthread_barrier_wait(&start);
    CHECK(pthread_cancel(self.thread) == 0 && pthread_join(self.thread, &result) == 0 && result == PTHREAD_CANCELED,
          "thread %d was not cancelled", i);
  }
  call_succeeds(&c, FORWARD);
  check_same_bits(&c.tensors[OUTPUT], expected, "a call behind cancelled ones");
  wd_threads_destroy(pool);
  pthread_barrier_destroy(&start);
  free(expected);
  call_free(&c);
}

void test_concurrency(void) {
  for (int of = 0; of < FLOAT_KINDS; of++) {
    callers((kind)of, 0, "no pool");
    callers((kind)of, 1, "one pool for all");
    callers((kind)of, CALLERS, "a pool each");
  }
  callers(BFLOAT16, 2, "two pools for all");
  sentences();
  pools_come_and_go();
  signals_stay_the_program_s();
  cancelled_callers();
}
