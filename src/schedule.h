/* schedule.h - which kernel serves a call: one rule, by the shape alone, so that every call can be captured in a graph.
 */
#ifndef WD_SCHEDULE_H
#define WD_SCHEDULE_H

#include "cpu.h"
#include "cuda.h"

/* A kernel of the table: an instruction set on the CPU, a schedule on CUDA. */
typedef struct {
  const char *name, *description;
  int32_t device_type;       /* kDLCPU or kDLCUDA */
  const wd_cpu_isa *isa;     /* CPU */
  wd_cuda_schedule schedule; /* CUDA */
} wd_kernel;

/* Row `index` of the table, best first for each device, CUDA rows (in builds that have them) before CPU rows. Returns 0
 * past the end. */
int wd_kernel_at(int32_t index, wd_kernel *kernel);

/* 1 when this machine can run it. */
int wd_kernel_usable(const wd_kernel *kernel);

/* The kernel for a call on device; `name` (may be NULL) asks for one row and fails where it does not fit. */
wd_status wd_choose_kernel(DLDevice device, const wd_moe_shape *shape, const char *name, wd_kernel *kernel);

#endif /* WD_SCHEDULE_H */
