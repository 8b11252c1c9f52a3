/* read_memory.c - wd_read_memory, the ceiling that benchmarks compare with: check, choose, read. */
#include "schedule.h"
#include "tensor.h"

static wd_status check_memory(const DLTensor *memory, const void *sink) {
  WD_CHECK(memory != NULL && memory->ndim >= 0 && memory->ndim <= 8, WD_INVALID_ARGUMENT,
           "memory: was %s, expected a compact tensor of at most 8 axes", memory == NULL ? "NULL" : "of another rank");
  const int64_t any[8] = {WD_ANY, WD_ANY, WD_ANY, WD_ANY, WD_ANY, WD_ANY, WD_ANY, WD_ANY};
  WD_TRY(wd_check_shape(memory, "memory", memory->ndim, any, "[...]"));
  WD_CHECK(memory->dtype.bits % 8 == 0 && memory->dtype.lanes == 1, WD_UNSUPPORTED,
           "memory: dtype had %u bits and %u lanes, expected whole bytes and 1 lane", memory->dtype.bits,
           memory->dtype.lanes);
  WD_TRY(wd_check_data(memory, "memory", 16));
  const size_t bytes = wd_tensor_bytes(memory);
  WD_CHECK(bytes % 16 == 0, WD_INVALID_ARGUMENT, "memory: had %zu bytes, expected a multiple of 16", bytes);
  WD_CHECK(sink != NULL && (uintptr_t)sink % 16 == 0, WD_INVALID_ARGUMENT,
           "sink: was %p, expected 16 bytes, aligned to 16, on the device of memory", sink);
  int64_t sixteen = 16;
  const DLTensor written = {.data = (void *)sink, .ndim = 1, .dtype = {kDLUInt, 8, 1}, .shape = &sixteen};
  return wd_check_disjoint(&written, "sink", memory, "memory");
}

wd_status wd_read_memory(const DLTensor *memory, void *sink, void *stream, const wd_options *options) {
  WD_TRY(check_memory(memory, sink));
  if (options != NULL) WD_TRY(wd_check_struct_size(options->struct_size, sizeof *options, "options"));
  const char *const name = options != NULL ? options->kernel : NULL;
  const size_t bytes = wd_tensor_bytes(memory);
  const int32_t type = (int32_t)memory->device.device_type;
  if (type == kDLCPU || type == kDLCUDAHost) {
    wd_kernel kernel;
    WD_TRY(wd_choose_kernel((DLDevice){kDLCPU, 0}, &(wd_moe_shape){0}, name, &kernel));
    wd_read_cpu(wd_tensor_data(memory), bytes, sink, kernel.isa, options != NULL ? options->threads : NULL);
    return WD_OK;
  }
  WD_CHECK(type == kDLCUDA, WD_UNSUPPORTED, "memory: DLPack device type was %d, expected %d (CPU) or %d (CUDA)", type,
           (int)kDLCPU, (int)kDLCUDA);
  WD_CHECK(name == NULL, WD_INVALID_ARGUMENT,
           "options: kernel was \"%s\", expected NULL: on CUDA there is one way to read memory", name);
  if (bytes == 0) return WD_OK;
  int32_t previous = 0;
  WD_TRY(wd_cuda_enter(memory->device.device_id, &previous));
  const wd_status status = wd_read_cuda(wd_tensor_data(memory), bytes, sink, stream);
  const wd_status left = wd_cuda_leave(previous);
  return status != WD_OK ? status : left;
}
