/* cpu.h - the CPU kernels as the API sees them: one family of drivers over several instruction sets. */
#ifndef WD_CPU_H
#define WD_CPU_H

#include "args.h"
#include "warpdecode.h"

/* The inner loops of one instruction set (isa.h says which). Every one gives the same bits. */
typedef struct wd_cpu_isa wd_cpu_isa;

/* Row `index` of the table, best first; NULL past the end. The last row is plain C and always usable. */
const wd_cpu_isa *wd_cpu_isa_at(int32_t index);
const char *wd_cpu_isa_name(const wd_cpu_isa *isa);        /* "cpu_avx512", "cpu_avx2", "cpu_neon", "cpu_generic" */
const char *wd_cpu_isa_description(const wd_cpu_isa *isa); /* one line */
int wd_cpu_isa_usable(const wd_cpu_isa *isa);              /* 1 when this machine has the instructions */

/* Bytes of scratch that either driver needs for this shape; a multiple of 64. The pointer handed over is 16-byte
 * aligned. */
size_t wd_cpu_scratch_bytes(const wd_moe_shape *shape);

/* The two operations. threads may be NULL (the calling thread alone). */
void wd_gate_up_cpu(const wd_gate_up_args *args, const wd_cpu_isa *isa, wd_threads *threads);
void wd_down_cpu(const wd_down_args *args, const wd_cpu_isa *isa, wd_threads *threads);

/* Reads `bytes` (a multiple of 16) and stores their xor to sink (8 bytes): a benchmark's ceiling. */
void wd_read_cpu(const void *memory, size_t bytes, void *sink, const wd_cpu_isa *isa, wd_threads *threads);

/* Runs task(context, worker, workers) once per worker, on the pool if it is free, and returns when all have ended. With
 * threads NULL or busy: task(context, 0, 1) on the calling thread. */
typedef void wd_task(void *context, int32_t worker, int32_t workers);
void wd_threads_run(wd_threads *threads, wd_task *task, void *context);

#endif /* WD_CPU_H */
