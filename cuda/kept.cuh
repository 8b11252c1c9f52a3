// kept.cuh - what a call writes and soon reads again: it stays in the L2 cache.
//
// Weights stream through L2, and would push it out to memory. Memory loses time whenever it turns from reading to
// writing: without this a layer of Qwen3-30B-A3B took 120.3 us at T = 8 (118.9 with it), 287.3 at 64 (279.7), 308.5 at
// 128 (299.3).
#pragma once
#include "common.cuh"

namespace wd {

__device__ __forceinline__ uint64_t policy_as_usual() {
  uint64_t usual;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(usual));
  return usual;
}
// For weights that are read once, where shape.kept: they leave first, and what is to be kept need not be found room
// for. Tiled, with boxes of 128 bytes (tensor_map.cu): Qwen3-30B-A3B took 304 us at T = 128 (291 with it), 320 at 256
// (312), OLMoE 215 and 237 (204, 227). Where too much is written to be kept it costs 2% (GLM-4.5-Air, Mixtral-8x7B at
// 256).
__device__ __forceinline__ uint64_t policy_for_once() {
  uint64_t once;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  return once;
}
// For stores: to be kept before all else where shape.kept, as any other where there is too much of it.
__device__ __forceinline__ uint64_t policy_for_kept(const wd_moe_shape &shape) {
  uint64_t kept;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept));
  return shape.kept ? kept : policy_as_usual();
}
__device__ __forceinline__ void store_kept(uint16_t *p, uint16_t value, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.b16 [%0], %1, %2;" ::"l"(p), "h"(value), "l"(policy) : "memory");
}
__device__ __forceinline__ void store_kept(uint32_t *p, uint32_t value, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.b32 [%0], %1, %2;" ::"l"(p), "r"(value), "l"(policy) : "memory");
}
__device__ __forceinline__ void store_kept(float *p, float value, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(p), "f"(value), "l"(policy) : "memory");
}
__device__ __forceinline__ void store_kept(uint4 *p, uint4 v, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void store_kept(float4 *p, float4 v, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w), "l"(policy)
               : "memory");
}

// 128 bytes, aligned to as many, that nobody reads any more: they need not go to memory.
__device__ __forceinline__ void forget(const void *line) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}

} // namespace wd
