/* activation.h - silu and gelu_tanh in float, the same bits wherever they are compiled.
 *
 *   silu(g)      = g / (1 + exp(-g))
 *   gelu_tanh(g) = g / (1 + exp(-2 u)),  u = sqrt(2/pi) (g + 0.044715 g^3)      [0.5 (1 + tanh u) = 1 / (1 + exp(-2
 * u))]
 *
 * exp is our own because libraries differ in their last bits: every step below is one IEEE operation, a fused
 * multiply-add or integer arithmetic, without branches, so that scalar and vectorised code agree. Its error stays below
 * 1.1 ulp; infinities, NaN and results in the subnormals are right. */
#ifndef WD_ACTIVATION_H
#define WD_ACTIVATION_H

#include "dtype.h"
#include "warpdecode.h"
#include <math.h>

static inline float wd_exp(float x) {
  /* Beyond these limits the result is infinity or zero anyway. A NaN passes both comparisons. */
  x = x > 90.0f ? 90.0f : x;
  x = x < -110.0f ? -110.0f : x;
  /* x = n ln 2 + r. Adding 1.5 * 2^23 rounds to an integer and leaves n in the low bits. */
  const float magic = 0x1.8p23f;
  const float biased = fmaf(x, 0x1.715476p0f, magic);
  const float n = biased - magic;
  float r = fmaf(n, -0x1.62e4p-1f, x);
  r = fmaf(n, -0x1.7f7d1cp-20f, r);
  /* exp(r) = 1 + r + r^2 q(r), |r| <= ln(2)/2 */
  float q = 1.9875691500e-4f;
  q = fmaf(q, r, 1.3981999507e-3f);
  q = fmaf(q, r, 8.3334519073e-3f);
  q = fmaf(q, r, 4.1665795894e-2f);
  q = fmaf(q, r, 1.6666665459e-1f);
  q = fmaf(q, r, 5.0000001201e-1f);
  const float power = fmaf(q, r * r, r) + 1.0f;
  /* 2^n as 2^(n0 + n1), since n runs from -159 to 130; the second product rounds (or overflows) once. n is offset by
   * 256 to stay unsigned. After a NaN the scale is rubbish and the product NaN. */
  const uint32_t offset_n = wd_float_bits(biased) - wd_float_bits(magic) + 256u;
  const uint32_t n0 = offset_n >> 1; /* n / 2 + 128 */
  const uint32_t n1 = offset_n - n0;
  return power * wd_bits_float((n0 - 1u) << 23) * wd_bits_float((n1 - 1u) << 23);
}

static inline float wd_silu(float g) {
  return g / (1.0f + wd_exp(-g));
}

static inline float wd_gelu_tanh(float g) {
  /* -2 u = g (a + b g^2), a = -2 sqrt(2/pi), b = 0.044715 a */
  const float minus_2u = g * fmaf(g * g, -0x1.2444f2p-4f, -0x1.988454p0f);
  return g / (1.0f + wd_exp(minus_2u));
}

#endif /* WD_ACTIVATION_H */
