// read.cu - a plain read of memory: the ceiling that benchmarks compare with. 16 bytes a lane, past L1, eight in flight
// a thread, in blocks of consecutive 32 KB; nothing is computed but a sum that keeps the compiler from dropping them.
// No hint for L2: with one for 256 bytes an H200 read 805 MB in 188 us, without in 173.
#include "../src/cuda.h"
#include "common.cuh"
#include "launch.cuh"

namespace wd {

__device__ __forceinline__ uint4 load_once(const void *p, bool valid) {
  uint4 v;
  asm volatile("{ .reg .pred q; setp.ne.u32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
               "  @q ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]; }"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "r"((unsigned)valid));
  return v;
}

constexpr int kReadThreads = 256, kReadAhead = 8;

__global__ void __launch_bounds__(kReadThreads) read_memory(const uint4 *memory, int64_t count, uint4 *sink) {
  const int64_t first = (int64_t)blockIdx.x * kReadThreads * kReadAhead + threadIdx.x;
  uint4 v[kReadAhead];
#pragma unroll
  for (int i = 0; i < kReadAhead; i++) {
    const int64_t index = first + i * kReadThreads;
    v[i] = load_once(memory + (index < count ? index : 0), index < count);
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
