// copies.cuh - rows through shared memory: asynchronous copies, a step of some values of k at a time.
#pragma once
#include "common.cuh"

namespace wd {

constexpr int kStep = 2 * kChunk, kStepBytes = 2 * kStep; // where 128 bytes of a row are a step

// Where piece `piece` (16 bytes) of row `row` lies in rows of `bytes`, a multiple of 128, so that neither the copies (a
// row at a time) nor the reads (two rows, four pieces of each) meet in a bank.
__host__ __device__ __forceinline__ constexpr int place_of(int row, int piece, int bytes) {
  return row * bytes + (piece ^ row % 2 * 4) * 16;
}

// A number as a type, for lambdas.
template <int VALUE> struct Constant {
  __host__ __device__ constexpr operator int() const {
    return VALUE;
  }
};

// 16 bytes from global to shared memory, past L1 (and without a hint for L2: with one for 256 bytes the layer took 3 to
// 7% longer from T = 1 to 256); zeros, and nothing is read, where !valid.
__device__ __forceinline__ void copy_ahead(uint32_t target, const void *source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
// The same where `wanted`, else nothing. No branch: instructions are not moved over one.
__device__ __forceinline__ void copy_ahead_if(bool wanted, uint32_t target, const void *source, bool valid) {
  asm volatile("{ .reg .pred wanted;\n"
               "setp.ne.b32 wanted, %3, 0;\n"
               "@wanted cp.async.cg.shared.global [%0], [%1], 16, %2; }" ::"r"(target),
               "l"(source), "r"(valid ? 16 : 0), "r"((int)wanted)
               : "memory");
}
// The same of a piece of a line whose other pieces other warps copy: all of its 128 bytes come to L2 at once
// (transposed weights of Llama 4, 64 bytes a warp: 5 to 12% faster).
__device__ __forceinline__ void copy_of_line(uint32_t target, const void *source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int RUNNING> __device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(RUNNING) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

} // namespace wd
