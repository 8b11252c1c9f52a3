/* schedule.c - the table of kernels and the rule that chooses from it. */
#include "schedule.h"

#include <string.h>

#ifdef WD_WITH_CUDA
static const wd_kernel cuda_kernels[] = {
    {"cuda_grouped", "a block an expert's rows, each expert read once for all its tokens", kDLCUDA, NULL,
     WD_CUDA_GROUPED},
    {"cuda_direct", "a block a route's rows, for few tokens; top_k up to 16", kDLCUDA, NULL, WD_CUDA_DIRECT},
};
enum { CUDA_KERNELS = sizeof cuda_kernels / sizeof *cuda_kernels };
#else
enum { CUDA_KERNELS = 0 };
#endif

int wd_kernel_at(int32_t index, wd_kernel *kernel) {
  if (index < 0) return 0;
#ifdef WD_WITH_CUDA
  if (index < CUDA_KERNELS) {
    *kernel = cuda_kernels[index];
    return 1;
  }
#endif
  const wd_cpu_isa *isa = wd_cpu_isa_at(index - CUDA_KERNELS);
  if (isa == NULL) return 0;
  *kernel = (wd_kernel){
      .name = wd_cpu_isa_name(isa), .description = wd_cpu_isa_description(isa), .device_type = kDLCPU, .isa = isa};
  return 1;
}

int wd_kernel_usable(const wd_kernel *kernel) {
  return kernel->device_type == kDLCPU ? wd_cpu_isa_usable(kernel->isa) : wd_cuda_usable();
}

static int fits(const wd_kernel *kernel, const wd_moe_shape *shape) {
  return kernel->device_type == kDLCPU || kernel->schedule != WD_CUDA_DIRECT ||
         shape->top_k <= WD_CUDA_DIRECT_MAX_TOP_K;
}

/* Direct reads an expert once per route, grouped once: with at most E/4 routes drawn evenly, direct reads at most 13%
 * more than grouped, most of it from L2, and has no empty blocks and no second launch. */
static int prefers_direct(const wd_moe_shape *shape) {
  return shape->tokens == 1 || 4 * shape->tokens * shape->top_k <= shape->experts;
}

wd_status wd_choose_kernel(int32_t device_type, const wd_moe_shape *shape, const char *name, wd_kernel *kernel) {
  if (name != NULL) {
    for (int32_t i = 0; wd_kernel_at(i, kernel); i++) {
      if (strcmp(kernel->name, name) != 0) continue;
      WD_CHECK(kernel->device_type == device_type, WD_INVALID_ARGUMENT,
               "options: kernel was \"%s\", which runs on %s, but the tensors are on %s", name,
               kernel->device_type == kDLCPU ? "the CPU" : "CUDA", device_type == kDLCPU ? "the CPU" : "CUDA");
      WD_CHECK(kernel->device_type != kDLCPU || wd_kernel_usable(kernel), WD_UNSUPPORTED,
               "options: kernel was \"%s\", whose instructions this processor does not have", name);
      WD_CHECK(fits(kernel, shape), WD_UNSUPPORTED, "options: kernel was \"%s\", which serves top_k up to %d, was %d",
               name, WD_CUDA_DIRECT_MAX_TOP_K, shape->top_k);
      return WD_OK;
    }
    return wd_fail(WD_INVALID_ARGUMENT, "options: kernel was \"%s\", expected a name that wd_get_kernel_info lists",
                   name);
  }
  for (int32_t i = 0; wd_kernel_at(i, kernel); i++) {
    if (kernel->device_type != device_type) continue;
    if (device_type == kDLCPU && wd_kernel_usable(kernel)) return WD_OK;
    if (device_type == kDLCUDA && fits(kernel, shape) &&
        (kernel->schedule == WD_CUDA_DIRECT) == (prefers_direct(shape) && shape->top_k <= WD_CUDA_DIRECT_MAX_TOP_K))
      return WD_OK;
  }
  /* Only a CPU-only build lacks a row, for CUDA tensors; its CUDA side says how to get a build that has them. */
  int32_t devices = 0;
  return wd_cuda_device_count(&devices);
}
