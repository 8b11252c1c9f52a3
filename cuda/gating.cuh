// gating.cuh - from finished sums to a value of the intermediate: routing weight, biases, limits, activation; in FP32.
#pragma once
#include "common.cuh"

namespace wd {

// ---- activations ----------------------------------------------------------------------------------------------------

// 2^t and 1 / (1 + 2^t) by the hardware's approximations: few instructions, because with many tokens a multiplying
// thread has seventy of these to do while no product runs.
__device__ __forceinline__ float power_of_two(float t) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  return power;
}
__device__ __forceinline__ float inverse_of(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}
// g / (1 + 2^t). Relative error below |t| 2^-24 + 2^-21 where t is rounded once (silu), three times the first term for
// gelu_tanh, whose t is rounded three times; results below 2^-126 become zero.
__device__ __forceinline__ float over_one_plus_power(float g, float t) {
  return __fmul_rn(g, inverse_of(__fadd_rn(1.0f, power_of_two(t))));
}

// g Phi(g), as src/activation.h has it: the tail Phi(-t) = exp(-t^2 / 2) N(s) / (t + 4), s = (t - 4) / (t + 4).
__device__ __forceinline__ float gelu(float g) {
  const float size = fabsf(g), t = size > 15.0f ? 15.0f : size; // a NaN stays one
  const float inverse = __fdiv_rn(1.0f, __fadd_rn(t, 4.0f)), s = __fmul_rn(__fadd_rn(t, -4.0f), inverse);
  constexpr float kN[] = {-0x1.196e2p-13f, 0x1.6e4974p-13f, 0x1.9b261ap-10f, -0x1.cc1722p-9f, -0x1.ed17d8p-8f,
                          0x1.eed34cp-5f,  -0x1.7e001ep-3f, 0x1.8c6d9ep-2f,  -0x1.373e38p-1f, 0x1.82b4bcp-1f};
  float n = kN[0];
#pragma unroll
  for (int i = 1; i < 10; i++)
    n = __fmaf_rn(n, s, kN[i]);
  const float square = __fmul_rn(t, t), rest = __fmaf_rn(t, t, -square);
  float power = power_of_two(__fmul_rn(square, -0.72134752f)); // exp(-square / 2)
  power = __fmaf_rn(power, __fmul_rn(-0.5f, rest), power);
  const float tail = __fmul_rn(power, __fmul_rn(n, inverse));
  return g < 0.0f ? __fmul_rn(g < -15.0f ? -15.0f : g, tail) : __fmul_rn(g, __fadd_rn(1.0f, -tail));
}

// Whether a gate is only ever silu or gelu_tanh and multiplies an up: then plain_gated() has the same bits as gated()
// of finished sums.
inline bool is_plain(const wd_gate_up_args &args) {
  const wd_gating &g = args.gating;
  return g.has_up && g.activation <= WD_ACTIVATION_GELU_TANH && g.alpha == 1.0f && g.limit_before == INFINITY &&
         g.limit_after == INFINITY && g.up_limit == INFINITY && g.up_offset == 0.0f &&
         !wd_bias_given(&args.gate_bias) && !wd_bias_given(&args.up_bias) && args.topk_weights == nullptr;
}
__device__ __forceinline__ float plain_gated(float gate, float up, bool is_gelu_tanh) {
  asm("max.NaN.f32 %0, %0, 0fFF7FFFFF;" : "+f"(gate)); // as in activate()
  const float t = is_gelu_tanh ? __fmaf_rn(__fmul_rn(gate, gate), -0.10294324f, -2.3022082f) : -1.44269504f;
  return __fmul_rn(over_one_plus_power(gate, __fmul_rn(gate, t)), up);
}

// silu(g) = g / (1 + exp(-alpha g));  gelu_tanh(g) = g / (1 + exp(-2 sqrt(2/pi) (g + 0.044715 g^3)))
__device__ __forceinline__ float activate(float g, const wd_gating &gating) {
  if (gating.activation == WD_ACTIVATION_RELU) return g < 0.0f ? 0.0f : g; // a NaN stays one
  if (gating.activation == WD_ACTIVATION_RELU2) return g < 0.0f ? 0.0f : __fmul_rn(g, g);
  if (gating.activation == WD_ACTIVATION_GELU) return gelu(g);
  asm("max.NaN.f32 %0, %0, 0fFF7FFFFF;" : "+f"(g)); // -inf would give inf * 0
  if (gating.activation == WD_ACTIVATION_GELU_TANH) // -2 sqrt(2/pi) log2(e), and 0.044715 times that
    return over_one_plus_power(g, __fmul_rn(g, __fmaf_rn(__fmul_rn(g, g), -0.10294324f, -2.3022082f)));
  return over_one_plus_power(g, __fmul_rn(g, __fmul_rn(-1.44269504f, gating.alpha)));
}

// ---- values ---------------------------------------------------------------------------------------------------------

// Both pass a NaN on.
__device__ __forceinline__ float at_most(float x, float limit) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
  return x;
}
__device__ __forceinline__ float at_least(float x, float limit) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
  return x;
}

// A gate with its up (wd_gating in src/args.h); limits and offsets that are not given change nothing.
__device__ __forceinline__ float gated(float gate, float up, const wd_gating &gating) {
  const float a = at_most(activate(at_most(gate, gating.limit_before), gating), gating.limit_after);
  if (!gating.has_up) return a;
  const float clamped = at_least(at_most(up, gating.up_limit), -gating.up_limit);
  return __fmul_rn(a, __fadd_rn(clamped, gating.up_offset));
}

// ---- what is added and multiplied before ----------------------------------------------------------------------------

// The bias of a row; -0, which changes nothing, where there is none.
__device__ __forceinline__ float bias_at(const wd_bias &bias, int expert, int row) {
  if (bias.data == nullptr && bias.pointers == nullptr) return -0.0f;
  const int64_t i = bias.offset + row * bias.row_stride;
  if (bias.pointers) return widen_weight((const void *)bias.pointers[expert], bias.dtype, i);
  return widen_weight(bias.data, bias.dtype, expert * bias.expert_stride + i);
}

// The routing weight of a route where it multiplies sums (gate_up: NULL means it does not; 1 changes nothing).
__device__ __forceinline__ float weight_at(const void *weights, wd_dtype dtype, int64_t route) {
  return weights ? widen_weight(weights, dtype, route) : 1.0f;
}

__device__ __forceinline__ float finished(float sum, float weight, float bias) {
  return __fadd_rn(__fmul_rn(sum, weight), bias);
}

} // namespace wd
