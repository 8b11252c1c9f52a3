// activation.cuh - the activations of wd_activation, in FP32.
#pragma once
#include "common.cuh"

namespace wd {

// g / (1 + 2^t) by the hardware's approximations: few instructions, because with many tokens a multiplying thread has
// seventy of these to do while no product runs. Relative error below |t| 2^-24 + 2^-21 for silu, and three
// times the first term for gelu_tanh, whose t is rounded three times; results below 2^-126 become zero.
__device__ __forceinline__ float over_one_plus_power(float g, float t) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fadd_rn(1.0f, power)));
  return __fmul_rn(g, inverse);
}

// silu(g) = g / (1 + exp(-g));  gelu_tanh(g) = g / (1 + exp(-2 sqrt(2/pi) (g + 0.044715 g^3)))
__device__ __forceinline__ float activate(float g, int activation) {
  asm("max.NaN.f32 %0, %0, 0fC3480000;" : "+f"(g)); // -200, where both are -0 already: -inf would give inf * 0
  if (activation == WD_ACTIVATION_GELU_TANH)        // -2 sqrt(2/pi) log2(e), and 0.044715 times that
    return over_one_plus_power(g, __fmul_rn(g, __fmaf_rn(__fmul_rn(g, g), -0.10294324f, -2.3022082f)));
  return over_one_plus_power(g, __fmul_rn(g, -1.44269504f));
}

} // namespace wd
