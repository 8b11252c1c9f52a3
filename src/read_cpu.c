/* read_cpu.c - a plain read of memory: the ceiling that benchmarks compare with.
 *
 * Each worker reads blocks of its own share with four independent sums; the compiler vectorises the inner loop. The xor
 * is stored so that no compiler may drop the reads. */
#include "cpu.h"

#include <stdatomic.h>

typedef struct {
  const uint64_t *words;
  size_t count; /* of words, even */
  _Atomic uint64_t *sink;
} read_job;

static void read_share(void *context, int32_t worker, int32_t workers) {
  const read_job *job = context;
  const size_t begin = job->count / 2 * (size_t)worker / (size_t)workers * 2;
  const size_t end = job->count / 2 * ((size_t)worker + 1) / (size_t)workers * 2;
  uint64_t sum[32] = {0};
  size_t i = begin;
  for (; i + 32 <= end; i += 32) {
    __builtin_prefetch(job->words + i + 256); /* two kilobytes ahead, as the kernels do */
    for (size_t j = 0; j < 32; j++)
      sum[j] ^= job->words[i + j];
  }
  for (; i < end; i++)
    sum[0] ^= job->words[i];
  for (size_t j = 1; j < 32; j++)
    sum[0] ^= sum[j];
  atomic_fetch_xor_explicit(job->sink, sum[0], memory_order_relaxed);
}

void wd_read_cpu(const void *memory, size_t bytes, void *sink, wd_threads *threads) {
  _Atomic uint64_t total = 0;
  read_job job = {memory, bytes / sizeof(uint64_t), &total};
  wd_threads_run(threads, read_share, &job);
  *(uint64_t *)sink = atomic_load_explicit(&total, memory_order_relaxed);
}
