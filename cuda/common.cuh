// common.cuh - what the kernels share: loads, tensor-core products, the streamed dot product, routes of an expert.
//
// The canonical order of every sum (the bits hang on it, see wd_numerics_id):
//   * k is cut into chunks of 32. A chunk is two mma.m16n8k16: the lane with t = lane % 4 holds k = 8t..8t+7 of the
//     chunk with one 16-byte load; its first four values are its share of the first product, the last four of the
//     second. Both operands agree, so the order within a product is free, and nothing is shuffled.
//   * a row is one chain of products from zero, in ascending k. One chain, because whatever must be kept beside it
//     (quarters, halves) takes accumulators from the kernels that serve many tokens at a time.
// A column of a product does not depend on the other columns, so it does not matter which tokens share a product, or
// how many: every schedule below gives the same bits.
#pragma once
#include "../src/args.h"
#include "../src/warpdecode.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace wd {

constexpr int kChunk = 32; // k of one step: 4 lanes x 16 bytes of a row

// ---- element types --------------------------------------------------------------------------------------------------

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T> struct Element;
template <> struct Element<bf16> {
  static __device__ __forceinline__ float widen(bf16 v) {
    return __bfloat162float(v);
  }
  static __device__ __forceinline__ bf16 round(float v) {
    return __float2bfloat16_rn(v);
  }
  static constexpr float kLowScale = 1.0f; // of the intermediate's low part
  static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};
template <> struct Element<f16> {
  static __device__ __forceinline__ float widen(f16 v) {
    return __half2float(v);
  }
  static __device__ __forceinline__ f16 round(float v) {
    return __float2half_rn(v);
  }
  static constexpr float kLowScale = 1 << WD_F16_LOW_SHIFT;
  static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

// ---- loads ----------------------------------------------------------------------------------------------------------

// 16 bytes of weights, read once: past L1. Zero where !valid. One asm block
// with a predicate: a branch around the load would let the assembler sink it behind the wait for its neighbours.
__device__ __forceinline__ uint4 load_weights(const void *p, bool valid) {
  uint4 v;
  asm volatile("{ .reg .pred q; setp.ne.u32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
               "  @q ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]; }"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "r"((unsigned)valid));
  return v;
}

// 16 bytes of activations, which every warp of the block reads again: kept in L1. Not .nc: under programmatic dependent
// launch the intermediate is written while this grid already runs.
__device__ __forceinline__ uint4 load_activations(const void *p, bool valid) {
  uint4 v;
  asm volatile("{ .reg .pred q; setp.ne.u32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
               "  @q ld.global.v4.u32 {%0,%1,%2,%3}, [%4]; }"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "r"((unsigned)valid)
               : "memory");
  return v;
}

// ---- programmatic dependent launch ----------------------------------------------------------------------------------

// Waits until the grid before this one has ended and its writes are visible; no-op for a plain launch.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next grid of the stream take SMs that this one leaves free.
__device__ __forceinline__ void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---- the streamed dot product ---------------------------------------------------------------------------------------

// Chunks of a row of `length` values, and the first chunk that is beyond it for the lane with t = lane % 4: length is a
// multiple of 8, not of 32, so that in the last chunk some lanes' eight values lie beyond the row.
__device__ __forceinline__ int chunks_of(int length) {
  return (length + kChunk - 1) / kChunk;
}
__device__ __forceinline__ int lane_limit(int length, int t) {
  return (length - 8 * t + kChunk - 1) / kChunk;
}

// One warp: c[part][tile] = rows (16) . columns (8 per tile). Lane (g = lane / 4, t = lane % 4) reads rows g and g + 8
// and column g of each tile; row and column pointers are the lane's own, 8t included. c[..][0,1]: row g, columns 2t,
// 2t+1; c[..][2,3]: row g + 8. WEIGHTS_AHEAD chunks of weights are in flight, COLUMNS_AHEAD of activations.
// before_columns() runs between the first loads of weights and the first of activations: the place for
// wait_for_previous_grid().
template <class T, int TILES, int PARTS, int WEIGHTS_AHEAD, int COLUMNS_AHEAD, class Before>
__device__ __forceinline__ void stream_dot(float (&c)[PARTS][TILES][4], const T *row_low, const T *row_high,
                                           const T *const (&column)[TILES], int64_t part_stride, int length,
                                           Before before_columns) {
  static_assert(WEIGHTS_AHEAD % COLUMNS_AHEAD == 0, "the unrolled body uses compile-time slots only");
  uint4 a[WEIGHTS_AHEAD][2], b[COLUMNS_AHEAD][PARTS][TILES];
  const int chunks = chunks_of(length), limit = lane_limit(length, threadIdx.x % 4);
  auto load_a = [&](int slot, int chunk) {
    const bool valid = chunk < limit;
    a[slot][0] = load_weights(row_low + (int64_t)chunk * kChunk, valid);
    a[slot][1] = load_weights(row_high + (int64_t)chunk * kChunk, valid);
  };
  auto load_b = [&](int slot, int chunk) {
    const bool valid = chunk < limit;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        b[slot][part][tile] = load_activations(column[tile] + part * part_stride + (int64_t)chunk * kChunk, valid);
  };
#pragma unroll
  for (int i = 0; i < WEIGHTS_AHEAD; i++)
    load_a(i, i);
  before_columns();
#pragma unroll
  for (int i = 0; i < COLUMNS_AHEAD; i++)
    load_b(i, i);
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        c[part][tile][i] = 0.0f;
  for (int chunk = 0; chunk < chunks; chunk += WEIGHTS_AHEAD) {
#pragma unroll
    for (int i = 0; i < WEIGHTS_AHEAD; i++) {
      const int j = i % COLUMNS_AHEAD;
      if (chunk + i < chunks) { // a product of zeros could turn a sum of -0 into +0: bits must not hang on unrolling
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int part = 0; part < PARTS; part++) {
            const uint4 &v = b[j][part][tile];
            Element<T>::mma(c[part][tile], a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y, v.x, v.y);
          }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int part = 0; part < PARTS; part++) {
            const uint4 &v = b[j][part][tile];
            Element<T>::mma(c[part][tile], a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w, v.z, v.w);
          }
      }
      load_a(i, chunk + i + WEIGHTS_AHEAD);
      load_b(j, chunk + i + COLUMNS_AHEAD);
    }
  }
}

// ---- the intermediate in two parts ----------------------------------------------------------------------------------

// Two neighbouring values, one 4-byte store.
template <class T> union Pair {
  T value[2];
  uint32_t bits;
  __device__ Pair() : bits(0) {
  }
};

// act(gate) * up as a high and a low part.
template <class T> __device__ __forceinline__ void split_intermediate(float activated, float up, T *high, T *low) {
  const float value = __fmul_rn(activated, up);
  *high = Element<T>::round(value);
  const float rest = __fsub_rn(value, Element<T>::widen(*high));
  *low = Element<T>::round(fabsf(rest) < INFINITY ? rest * Element<T>::kLowScale : 0.0f); // inf - inf would be NaN
}

// dot(high) + dot(low) * 2^-S
template <class T> __device__ __forceinline__ float join_parts(float high, float low) {
  return __fadd_rn(high, __fmul_rn(low, 1.0f / Element<T>::kLowScale));
}

// ---- routing --------------------------------------------------------------------------------------------------------

// The expert of a route, or -1 where the id is outside [0, E). The comparison is made in 64 bits, before any narrowing.
__device__ __forceinline__ int expert_of(const void *ids, int id_bytes, int64_t route, int experts) {
  const int64_t id = id_bytes == 8 ? ((const int64_t *)ids)[route] : ((const int32_t *)ids)[route];
  return id >= 0 && id < experts ? (int)id : -1;
}

__device__ __forceinline__ float widen_weight(const void *weights, wd_dtype dtype, int64_t i) {
  if (dtype == WD_F32) return ((const float *)weights)[i];
  return dtype == WD_BF16 ? __bfloat162float(((const bf16 *)weights)[i]) : __half2float(((const f16 *)weights)[i]);
}

// Where the routes of each expert are found (routes.cuh).
struct RouteLists {
  const int32_t *offsets; // [E + 1], or NULL: the block searches topk_ids itself
  const int32_t *routes;  // [T*K], the routes of expert e at offsets[e] .. offsets[e+1]
};

} // namespace wd
