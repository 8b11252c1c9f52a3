/* cuda_absent.c - the CUDA side of a CPU-only build: every entry says how to get one with CUDA. */
#include "cuda.h"

static wd_status absent(void) {
  return wd_fail(WD_NO_CUDA,
                 "CUDA: this build of warpdecode is CPU-only (it was built without nvcc or with "
                 "WARPDECODE_CUDA=off); reinstall with WARPDECODE_CUDA=on and nvcc 13.0 or newer on the PATH "
                 "or from PyPI's cuda-toolkit[nvcc,cudart,cccl], or move the tensors to the CPU");
}

wd_status wd_cuda_enter(int32_t device, int32_t *previous) {
  (void)device;
  (void)previous;
  return absent();
}

wd_status wd_cuda_leave(int32_t previous) {
  (void)previous;
  return absent();
}

size_t wd_cuda_scratch_bytes(const wd_moe_shape *shape) {
  (void)shape;
  return 0;
}

wd_status wd_gate_up_cuda(const wd_gate_up_args *args, wd_cuda_schedule schedule, wd_cuda_handover *handover,
                          void *stream) {
  (void)args;
  (void)schedule;
  (void)handover;
  (void)stream;
  return absent();
}

wd_status wd_down_cuda(const wd_down_args *args, wd_cuda_schedule schedule, const wd_cuda_handover *handover,
                       void *stream) {
  (void)args;
  (void)schedule;
  (void)handover;
  (void)stream;
  return absent();
}

wd_status wd_read_cuda(const void *memory, size_t bytes, void *sink, void *stream) {
  (void)memory;
  (void)bytes;
  (void)sink;
  (void)stream;
  return absent();
}

wd_status wd_cuda_device_count(int32_t *count) {
  WD_CHECK(count != NULL, WD_INVALID_ARGUMENT, "count: was NULL, expected a place for the number of devices");
  *count = 0;
  return absent();
}

wd_status wd_get_cuda_device_info(int32_t device, wd_cuda_device_info *info) {
  (void)device;
  (void)info;
  return absent();
}

int wd_cuda_usable(wd_cuda_schedule schedule) {
  (void)schedule;
  return 0;
}

int32_t wd_cuda_runtime_version(void) {
  return 0;
}

const char *wd_cuda_architectures(void) {
  return "";
}
