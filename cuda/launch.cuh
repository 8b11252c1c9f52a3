// launch.cuh - host side: CUDA errors become statuses and sentences; one way to launch.
#pragma once
#include "../src/args.h"
#include "../src/check.h"
#include "../src/cuda.h"
#include "device.cuh"
#include <atomic>
#include <cuda_runtime.h>

namespace wd {

wd_status cuda_failed(cudaError_t error, const char *what); // sets the sentence; WD_CUDA_ERROR

#define WD_CUDA(call)                                                                                                  \
  do {                                                                                                                 \
    const cudaError_t wd_cuda_error = (call);                                                                          \
    if (wd_cuda_error != cudaSuccess) return ::wd::cuda_failed(wd_cuda_error, #call);                                  \
  } while (0)

// dependent: programmatic dependent launch, where the device serves it - the kernel may start before the one before it
// has ended, and before it touches anything that one writes it calls wait_for_previous_grid(), or, down, sees that the
// blocks which write it are through (flags.cuh, meet() of tiled_streams.cuh). The first kernel of a call (but down's,
// called alone, where it needs no lists) starts so behind whatever its stream has before it: it waits at once, and only
// then lets the next one in, so that none of a call's kernels touches anything, weights and scratch neither, before all
// that was enqueued before the call has ended.
template <class... Parameters, class... Arguments>
wd_status launch(const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                 cudaStream_t stream, bool dependent, Arguments... arguments) {
  bool early = false;
  if (dependent) WD_TRY(serves_dependent_launch(&early));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return error == cudaSuccess ? WD_OK : cuda_failed(error, name);
}

// launch() of a kernel that may want more than the 48 KB of shared memory that every block gets. Asks for it once a
// device; all kernels of a layer prefer the same split between L1 and shared memory, those that need none of it, too:
// changing it costs microseconds, and lets no grid begin on an SM where the one before still runs.
wd_status allow_shared_memory(const void *kernel, std::atomic<uint64_t> *devices);
template <auto KERNEL, class... Arguments>
wd_status launch_shared(const char *name, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                        bool dependent, Arguments... arguments) {
  static std::atomic<uint64_t> devices; // a bit each: read-only once set
  WD_TRY(allow_shared_memory((const void *)KERNEL, &devices));
  return launch(name, KERNEL, grid, block, shared_bytes, stream, dependent, arguments...);
}

constexpr size_t align16(size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

struct RouteLists;

// Routes sorted by expert (routes.cu), at the start of the scratch: where they lie, and the launch. With hidden_states
// [T, H], those as columns of tokens (columns.cuh), too.
RouteLists sorted_routes(const wd_moe_shape &shape, void *scratch);
wd_status sort_routes(const wd_moe_shape &shape, const void *topk_ids, void *scratch, const void *hidden_states,
                      void *columns, cudaStream_t stream);
// Behind sort_routes: groups of columns (columns.cuh), from hidden states [T, length] (one part), or from an
// intermediate [T, K, parts, length].
wd_status sort_columns(const wd_moe_shape &shape, void *scratch, const void *source, void *columns, int parts,
                       int length, cudaStream_t stream);

// down, direct schedule. dependent: the grid before is this call's gate_up.
wd_status down_direct(const wd_down_args &args, bool dependent, cudaStream_t stream);
// The tiled schedule (tiled.cuh). gate_up leaves columns where the intermediate would be when down of the same call
// follows. handover: to down where the grid before is this call's gate_up, and may still run; else NULL.
wd_status gate_up_tiled(const wd_gate_up_args &args, const RouteLists &lists, const void *columns,
                        wd_cuda_handover *handover, cudaStream_t stream);
wd_status down_tiled(const wd_down_args &args, const RouteLists &lists, const void *columns,
                     const wd_cuda_handover *handover, cudaStream_t stream);
} // namespace wd
