/* info.c - what this build is and contains. */
#include "schedule.h"

#define WD_TEXT(x) #x
#define WD_VERSION_TEXT(major, minor, patch) WD_TEXT(major) "." WD_TEXT(minor) "." WD_TEXT(patch)

_Static_assert(WD_VERSION_MAJOR == 0 && WD_VERSION_MINOR == 1 && WD_VERSION_PATCH == 0,
               "the numbers of warpdecode.h and the text below belong together");

const char *wd_version(void) {
  return WD_VERSION_TEXT(0, 1, 0);
}

/* Raise a part whenever a bit of any output of its side may change: cpu (src/gate_up_cpu.c, src/down_cpu.c and the
 * order of sums in src/isa.h), mma (cuda/common.cuh). */
const char *wd_numerics_id(void) {
  return "cpu1+mma2";
}

wd_status wd_get_build_info(wd_build_info *info) {
  WD_CHECK(info != NULL, WD_INVALID_ARGUMENT, "info: was NULL, expected a wd_build_info");
  WD_TRY(wd_check_struct_size(info->struct_size, sizeof *info, "info"));
#ifdef WD_WITH_CUDA
  info->cuda_compiled = 1;
#else
  info->cuda_compiled = 0;
#endif
  info->cuda_runtime_version = wd_cuda_runtime_version();
  info->cuda_architectures = wd_cuda_architectures();
  info->compiler = __VERSION__;
  return WD_OK;
}

int32_t wd_kernel_count(void) {
  wd_kernel kernel;
  int32_t count = 0;
  while (wd_kernel_at(count, &kernel))
    count++;
  return count;
}

wd_status wd_get_kernel_info(int32_t index, wd_kernel_info *info) {
  wd_kernel kernel;
  WD_CHECK(info != NULL, WD_INVALID_ARGUMENT, "info: was NULL, expected a wd_kernel_info");
  WD_TRY(wd_check_struct_size(info->struct_size, sizeof *info, "info"));
  WD_CHECK(wd_kernel_at(index, &kernel), WD_INVALID_ARGUMENT, "index: was %d, expected 0 to %d", index,
           wd_kernel_count() - 1);
  info->name = kernel.name;
  info->description = kernel.description;
  info->device_type = kernel.device_type;
  info->usable = wd_kernel_usable(&kernel);
  return WD_OK;
}
