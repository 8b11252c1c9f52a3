/* activation.h - the activations in float, the same bits wherever they are compiled.
 *
 *   silu(g)      = g / (1 + exp(-alpha g)), alpha 1 where none is given
 *   gelu_tanh(g) = g / (1 + exp(-2 u)),  u = sqrt(2/pi) (g + 0.044715 g^3)      [0.5 (1 + tanh u) = 1 / (1 + exp(-2
 * u))]
 *   gelu(g)      = g Phi(g),  Phi the normal distribution, (1 + erf(g / sqrt 2)) / 2
 *   relu(g)      = max(g, 0), relu2(g) = relu(g)^2
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

static inline float wd_silu(float g, float alpha) {
  return g / (1.0f + wd_exp(-alpha * g));
}

static inline float wd_gelu_tanh(float g) {
  /* -2 u = g (a + b g^2), a = -2 sqrt(2/pi), b = 0.044715 a */
  const float minus_2u = g * fmaf(g * g, -0x1.2444f2p-4f, -0x1.988454p0f);
  return g / (1.0f + wd_exp(minus_2u));
}

/* The tail Phi(-t) = exp(-t^2 / 2) N(s) / (t + 4) for t >= 0, where s = (t - 4) / (t + 4) takes [0, 15] to [-1, 0.58]
 * and N is a polynomial of degree 9, fitted to 9.1e-9 relative. Negative g take the tail itself, so nothing cancels.
 *
 * The bound, u = 2^-24: s carries four roundings, 4.4u of N by N's slope; Horner's fused steps 2.1u, the rounding of
 * the coefficients 2.6u and the fit 0.2u; the inverse 2u, three products 3u; exp 2.2u and 1u for its argument, whose
 * rounding `rest` puts back. Together 16u. Measured over every float: 7.2u, in results that are no subnormals. */
static inline float wd_gelu(float g) {
  /* Beyond -15 the result is zero, beyond 15 g itself. A NaN passes both comparisons. */
  g = g < -15.0f ? -15.0f : g;
  const float magnitude = fabsf(g);
  const float t = magnitude > 15.0f ? 15.0f : magnitude;
  const float inverse = 1.0f / (t + 4.0f);
  const float s = (t - 4.0f) * inverse;
  float n = -0x1.196e2p-13f;
  n = fmaf(n, s, 0x1.6e4974p-13f);
  n = fmaf(n, s, 0x1.9b261ap-10f);
  n = fmaf(n, s, -0x1.cc1722p-9f);
  n = fmaf(n, s, -0x1.ed17d8p-8f);
  n = fmaf(n, s, 0x1.eed34cp-5f);
  n = fmaf(n, s, -0x1.7e001ep-3f);
  n = fmaf(n, s, 0x1.8c6d9ep-2f);
  n = fmaf(n, s, -0x1.373e38p-1f);
  n = fmaf(n, s, 0x1.82b4bcp-1f);
  const float square = t * t;
  const float rest = fmaf(t, t, -square);
  float power = wd_exp(-0.5f * square);
  power = fmaf(power, -0.5f * rest, power);
  const float ratio = n * inverse; /* of the tail to the power: a tail too small for a float may still count times g */
  return g < 0.0f ? power * (ratio * g) : g * (1.0f - power * ratio);
}

static inline float wd_relu(float g) {
  return g < 0.0f ? 0.0f : g; /* a NaN stays one */
}

static inline float wd_relu2(float g) {
  return wd_relu(g) * wd_relu(g);
}

#endif /* WD_ACTIVATION_H */
