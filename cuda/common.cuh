// common.cuh - what the kernels share: the order of every sum, tensor-core products, the intermediate's parts, routing.
//
// The canonical order of every sum (the bits hang on it, see wd_numerics_id):
//   * k is cut into chunks of 32. A chunk is two mma.m16n8k16: the lane with t = lane % 4 holds k = 8t..8t+7 of the
//     chunk with one 16-byte load; its first four values are its share of the first product, the last four of the
//     second. Both operands agree, so the order within a product is free, and nothing is shuffled.
//   * a row is one chain of products from zero, in ascending k. One chain, because whatever must be kept beside it
//     (quarters, halves) takes accumulators from the kernels that serve many tokens at a time.
// A column of a product does not depend on the other columns, so it does not matter which tokens share a product, or
// how many: every schedule gives the same bits. wgmma (tiled.cuh) gives the bits of mma.sync in the same order along k.
#pragma once
#include "../src/args.h"
#include "../src/warpdecode.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace wd {

constexpr int kChunk = 32; // k of two products: 4 lanes x 16 bytes of a row

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
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// ---- loads ----------------------------------------------------------------------------------------------------------

// 16 bytes; zeros, and nothing is read, where !valid.
__device__ __forceinline__ uint4 load_valid(const void *p, bool valid) {
  return valid ? *(const uint4 *)p : make_uint4(0, 0, 0, 0);
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
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- between grids that run side by side ----------------------------------------------------------------------------

__device__ __forceinline__ void store_relaxed(int32_t *p, int32_t value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ int32_t load_relaxed(const int32_t *p) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
// Whoever reads this value with load_acquire() reads what this thread, and those that it has met, wrote before.
__device__ __forceinline__ void store_release(int32_t *p, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ int32_t load_acquire(const int32_t *p) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// ---- rows in chunks -------------------------------------------------------------------------------------------------

// Chunks of a row of `length` values.
__host__ __device__ __forceinline__ int chunks_of(int length) {
  return (length + kChunk - 1) / kChunk;
}

// Row 0 of an expert's projection (src/args.h).
template <class T> __device__ __forceinline__ const T *rows_of(const wd_matrix &m, int expert) {
  return (m.pointers ? (const T *)m.pointers[expert] : (const T *)m.data + expert * m.expert_stride) + m.offset;
}

// ---- the intermediate in two parts ----------------------------------------------------------------------------------

// Two neighbouring values, one 4-byte store.
template <class T> union Pair {
  T value[2];
  uint32_t bits;
  __device__ Pair() : bits(0) {
  }
};

// A value of the intermediate as a high and a low part.
template <class T> __device__ __forceinline__ void split_intermediate(float value, T *high, T *low) {
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
  int32_t *taken;         // [2], zeros: for gate_up and down, how many items blocks have taken
  int32_t *served;        // [E + 1], zeros: units that tiled's gate_up has served, of each expert, of all
};

} // namespace wd
