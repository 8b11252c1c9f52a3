// activation.cuh - the activations of wd_activation, in FP32. The epilogue of a kernel bound by memory: accurate
// functions cost nothing here, and a run-time switch neither.
#pragma once
#include "common.cuh"

namespace wd {

__device__ __forceinline__ float activate(float g, int activation) {
  if (activation == WD_ACTIVATION_GELU_TANH) {
    const float inner = __fmul_rn(0.7978845608028654f, __fmaf_rn(__fmul_rn(0.044715f, g), __fmul_rn(g, g), g));
    return __fmul_rn(__fmul_rn(0.5f, g), __fadd_rn(1.0f, tanhf(inner)));
  }
  // exp(-g) is inf below g = -88, and g / inf the right -0; only -inf itself would give inf / inf
  return g == -INFINITY ? -0.0f : __fdiv_rn(g, __fadd_rn(1.0f, expf(-g)));
}

} // namespace wd
