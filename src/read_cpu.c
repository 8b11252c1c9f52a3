/* read_cpu.c - a plain read of memory: the ceiling that benchmarks compare with.
 *
 * Workers take blocks from a counter, as the kernels take rows: with shares fixed beforehand, a worker that loses its
 * core for a moment lets all others wait. Blocks of 256 KB to 4 MB were as fast as shares, on two quiet cores. The xor
 * is stored so that no compiler may drop the reads. */
#include "isa.h"

#include <stdatomic.h>

enum { BLOCK_WORDS = 1 << 17 }; /* 1 MB */

typedef struct {
  const uint64_t *words;
  size_t count;
  wd_read_fn *read;
  atomic_size_t next_block;
  _Atomic uint64_t sum;
} read_job;

static void read_blocks(void *context, int32_t worker, int32_t workers) {
  read_job *const job = context;
  (void)worker;
  (void)workers;
  uint64_t sum = 0;
  for (;;) {
    const size_t begin = atomic_fetch_add_explicit(&job->next_block, 1, memory_order_relaxed) * BLOCK_WORDS;
    if (begin >= job->count) break;
    const size_t left = job->count - begin;
    sum ^= job->read(job->words + begin, left < BLOCK_WORDS ? left : BLOCK_WORDS);
  }
  atomic_fetch_xor_explicit(&job->sum, sum, memory_order_relaxed);
}

void wd_read_cpu(const void *memory, size_t bytes, void *sink, const wd_cpu_isa *isa, wd_threads *threads) {
  read_job job = {.words = memory, .count = bytes / sizeof(uint64_t), .read = isa->read};
  atomic_init(&job.next_block, 0);
  atomic_init(&job.sum, 0);
  wd_threads_run(threads, read_blocks, &job);
  *(uint64_t *)sink = atomic_load_explicit(&job.sum, memory_order_relaxed);
}
