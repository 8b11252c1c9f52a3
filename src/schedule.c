/* schedule.c - the table of kernels and the rule that chooses from it. */
#include "schedule.h"

#include <string.h>

#ifdef WD_WITH_CUDA
static const wd_kernel cuda_kernels[] = {
    {"cuda_direct",
     "a warp a route's rows, for few tokens; top_k up to 16, 10 where a block has 99 KB of shared memory; hidden and "
     "intermediate up to 1048560",
     kDLCUDA, NULL, WD_CUDA_DIRECT},
    {"cuda_tiled",
     "wgmma, up to 256 rows a block, from eight to twelve tokens an expert on, sooner where weights are larger; "
     "compute capability 9.0, up to 512 experts, rows in one piece",
     kDLCUDA, NULL, WD_CUDA_TILED},
    {"cuda_grouped", "a block an expert's rows, each expert read once for all its tokens", kDLCUDA, NULL,
     WD_CUDA_GROUPED},
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
  return kernel->device_type == kDLCPU ? wd_cpu_isa_usable(kernel->isa) : wd_cuda_usable(kernel->schedule);
}

static int serves(const wd_kernel *kernel, DLDevice device, const wd_moe_shape *shape) {
#ifdef WD_WITH_CUDA
  if (kernel->device_type == kDLCUDA) return wd_cuda_serves(kernel->schedule, device.device_id, shape);
#endif
  (void)kernel, (void)device, (void)shape;
  return 1;
}

/* How many other routes ask for the expert of a route, ids drawn evenly. */
static double others_of_route(const wd_moe_shape *s) {
  return (double)(s->tokens - 1) * s->top_k / s->experts;
}
/* Bytes of gate, up and down that a call which reads an expert once a route reads more than once: each pair of routes
 * counts once. */
static double bytes_read_again(const wd_moe_shape *s) {
  return (double)(s->tokens * s->top_k) * 3 * s->hidden * s->intermediate * 2 * others_of_route(s) / 2;
}

/* Direct has nothing to look up and no launch behind down, 4 to 9 us on an H200, and reads an expert once a route, from
 * L2 where the routes run side by side: it is chosen where what it reads again takes no longer than that, or, of up to
 * four tokens, is little beside the rest. Tiled reads faster than grouped, the more so the more routes an expert has,
 * but prepares lists first, some 4 us: it is chosen from eight routes an expert on, or, where down's rows are short and
 * its items with them, twelve; sooner where direct would read 3.3 GB again (OLMoE's 6.2 at T = 32: 184.3 us, grouped
 * 186.2; Qwen3.5-35B-A3B's 3.2 at 64: 319.0, grouped 317.3). Between them, and where tiled does not serve: grouped. */
static int prefers(const wd_kernel *kernel, const wd_moe_shape *shape) {
  const int64_t routes = shape->tokens * shape->top_k;
  switch (kernel->schedule) {
  case WD_CUDA_DIRECT:
    return bytes_read_again(shape) <= 40e6 || (shape->tokens <= 4 && others_of_route(shape) <= 0.3);
  case WD_CUDA_TILED:
    return routes >= (shape->intermediate < 640 ? 12 : 8) * (int64_t)shape->experts || bytes_read_again(shape) >= 3.3e9;
  default:
    return 1;
  }
}

wd_status wd_choose_kernel(DLDevice device, const wd_moe_shape *shape, const char *name, wd_kernel *kernel) {
  if (name != NULL) {
    for (int32_t i = 0; wd_kernel_at(i, kernel); i++) {
      if (strcmp(kernel->name, name) != 0) continue;
      WD_CHECK(kernel->device_type == (int32_t)device.device_type, WD_INVALID_ARGUMENT,
               "options: kernel was \"%s\", which runs on %s, but the tensors are on %s", name,
               kernel->device_type == kDLCPU ? "the CPU" : "CUDA", device.device_type == kDLCPU ? "the CPU" : "CUDA");
      WD_CHECK(kernel->device_type != kDLCPU || wd_kernel_usable(kernel), WD_UNSUPPORTED,
               "options: kernel was \"%s\", whose instructions this processor does not have", name);
      WD_CHECK(
          serves(kernel, device, shape), WD_UNSUPPORTED,
          "options: kernel was \"%s\" (%s), which does not serve top_k %d, %d experts and weights %s on this device",
          name, kernel->description, shape->top_k, shape->experts,
          shape->scattered    ? "at addresses of their own"
          : shape->transposed ? "that are transposed"
                              : "as rows");
      return WD_OK;
    }
    return wd_fail(WD_INVALID_ARGUMENT, "options: kernel was \"%s\", expected a name that wd_get_kernel_info lists",
                   name);
  }
  for (int32_t i = 0; wd_kernel_at(i, kernel); i++) {
    if (kernel->device_type != (int32_t)device.device_type) continue;
    if (device.device_type == kDLCPU ? wd_kernel_usable(kernel)
                                     : serves(kernel, device, shape) && prefers(kernel, shape))
      return WD_OK;
  }
  /* Only a CPU-only build lacks a row, for CUDA tensors; its CUDA side says how to get a build that has them. */
  int32_t devices = 0;
  return wd_cuda_device_count(&devices);
}
