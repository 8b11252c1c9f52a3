// read.cu - a plain read of memory: the ceiling that benchmarks compare with. The loads are those of the kernels (16
// bytes a lane, past L1, 256-byte hint), eight in flight a thread, in blocks of consecutive 32 KB; nothing is computed
// but a sum that keeps the compiler from dropping them.
#include "../src/cuda.h"
#include "common.cuh"
#include "launch.cuh"

namespace wd {

constexpr int kReadThreads = 256, kReadAhead = 8;

__global__ void __launch_bounds__(kReadThreads) read_memory(const uint4 *memory, int64_t count, uint4 *sink) {
  const int64_t first = (int64_t)blockIdx.x * kReadThreads * kReadAhead + threadIdx.x;
  uint4 v[kReadAhead];
#pragma unroll
  for (int i = 0; i < kReadAhead; i++) {
    const int64_t index = first + i * kReadThreads;
    v[i] = load_weights(memory + (index < count ? index : 0), index < count);
  }
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kReadAhead; i++)
    sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  if (sum == 0x9e3779b9u) *sink = v[0]; // rarely, and it does not matter: the loads must look needed
}

} // namespace wd

wd_status wd_read_cuda(const void *memory, size_t bytes, void *sink, void *stream) {
  const int64_t count = (int64_t)(bytes / 16), per_block = wd::kReadThreads * wd::kReadAhead;
  return wd::launch("read_memory", wd::read_memory, dim3((unsigned)((count + per_block - 1) / per_block)),
                    dim3(wd::kReadThreads), 0, (cudaStream_t)stream, false, (const uint4 *)memory, count,
                    (uint4 *)sink);
}
