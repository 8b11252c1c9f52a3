// wgmma.cuh - sm_90a's warpgroup products and the barriers of a pipeline through shared memory.
#pragma once
#include "copies.cuh"

namespace wd {

// ---- warpgroup products ---------------------------------------------------------------------------------------------

// c[tile] += rows (64, in registers: 16 a warp, as mma.sync's first operand) . columns (8 * TILES, in shared memory).
// Accumulators lie as mma.sync's do: c[tile][0,1]: row g, columns 2t, 2t+1; c[tile][2,3]: row g + 8. The products are
// under way until wgmma_wait(); a0..a3 must not change before.
template <class T, int TILES> struct Wgmma;

#define WD_ACCUMULATORS_4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define WD_ACCUMULATORS_8(i) WD_ACCUMULATORS_4(i), WD_ACCUMULATORS_4(i + 1)
#define WD_ACCUMULATORS_16(i) WD_ACCUMULATORS_8(i), WD_ACCUMULATORS_8(i + 2)
#define WD_ACCUMULATORS_32(i) WD_ACCUMULATORS_16(i), WD_ACCUMULATORS_16(i + 4)
#define WD_ACCUMULATORS_64(i) WD_ACCUMULATORS_32(i), WD_ACCUMULATORS_32(i + 8)
#define WD_NAMES_4 "%0,%1,%2,%3"
#define WD_NAMES_8 WD_NAMES_4 ",%4,%5,%6,%7"
#define WD_NAMES_16 WD_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define WD_NAMES_32 WD_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WD_NAMES_64                                                                                                    \
  WD_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"      \
              "%56,%57,%58,%59,%60,%61,%62,%63"
#define WD_NAMES_48 WD_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define WD_ACCUMULATORS_48(i) WD_ACCUMULATORS_32(i), WD_ACCUMULATORS_16(i + 8)
#define WD_NAMES_80 WD_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define WD_ACCUMULATORS_80(i) WD_ACCUMULATORS_64(i), WD_ACCUMULATORS_16(i + 16)
#define WD_WGMMA(type, name, tiles, columns, registers, a0n, a1n, a2n, a3n, dn)                                        \
  template <> struct Wgmma<type, tiles> {                                                                              \
    static __device__ __forceinline__ void multiply(float (&c)[tiles][4], uint32_t a0, uint32_t a1, uint32_t a2,       \
                                                    uint32_t a3, uint64_t columns_descriptor) {                        \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" WD_NAMES_##registers     \
                   "}, {%" #a0n ",%" #a1n ",%" #a2n ",%" #a3n "}, %" #dn ", 1, 1, 1, 0;"                               \
                   : WD_ACCUMULATORS_##registers(0)                                                                    \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(columns_descriptor));                                     \
    }                                                                                                                  \
  };
#define WD_WGMMA_TYPES(...) WD_WGMMA(bf16, "bf16", __VA_ARGS__) WD_WGMMA(f16, "f16", __VA_ARGS__)
WD_WGMMA_TYPES(1, 8, 4, 4, 5, 6, 7, 8)
WD_WGMMA_TYPES(2, 16, 8, 8, 9, 10, 11, 12)
WD_WGMMA_TYPES(4, 32, 16, 16, 17, 18, 19, 20)
WD_WGMMA_TYPES(8, 64, 32, 32, 33, 34, 35, 36)
WD_WGMMA_TYPES(12, 96, 48, 48, 49, 50, 51, 52)
WD_WGMMA_TYPES(16, 128, 64, 64, 65, 66, 67, 68)
WD_WGMMA_TYPES(20, 160, 80, 80, 81, 82, 83, 84)

// Before the first product after registers were written; after the last product of a group; until all are done.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Behind wgmma_wait(): what is computed of the sums stays behind it, too.
template <int HALVES, int TILES> __device__ __forceinline__ void wgmma_results(float (&c)[HALVES][TILES][4]) {
#pragma unroll
  for (int half = 0; half < HALVES; half++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        asm volatile("" : "+f"(c[half][tile][i]));
}

// Where 16 values of k of the columns lie: two 8 x 16-byte matrices along k, `k_bytes` apart, repeated every
// `group_bytes` (8 columns). No swizzle: a matrix is 128 bytes in a row.
__device__ __forceinline__ uint64_t columns_descriptor(uint32_t shared_address, uint32_t k_bytes,
                                                       uint32_t group_bytes) {
  return (uint64_t)(shared_address >> 4) | (uint64_t)(k_bytes >> 4) << 16 | (uint64_t)(group_bytes >> 4) << 32;
}

// ---- barriers in shared memory --------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t *barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and has the phase wait for so many bytes of copies.
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended. A barrier starts in phase 0; waiting for parity 1 then returns at
// once, so that the first round of a ring finds its places empty.
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, unsigned parity) {
  asm volatile("{ .reg .pred done;\n"
               "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again; }" ::"r"(shared_address(barrier)),
               "r"(parity)
               : "memory");
}

// Behind wait_for_previous_grid(), or meet() of tiled_streams.cuh: what that grid stored can be brought by copies of
// the tensor memory accelerator.
__device__ __forceinline__ void allow_copies_of_written() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// One lane of the warp, all of which call it. ptxas knows what it means: behind threadIdx.x == 0 it would put a loop
// over the lanes around every copy.
__device__ __forceinline__ bool elected() {
  uint32_t one;
  asm volatile("{ .reg .pred one;\n"
               "elect.sync _|one, 0xffffffff;\n"
               "selp.u32 %0, 1, 0, one; }"
               : "=r"(one));
  return one != 0;
}

// ---- registers of a warpgroup ---------------------------------------------------------------------------------------

template <int REGISTERS> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

} // namespace wd
