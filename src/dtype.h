/* dtype.h - bfloat16 and float16 to and from float, in plain C.
 *
 * Widening is exact. Narrowing rounds to nearest even, overflows to infinity, and gives one NaN (the positive quiet one
 * without payload), because x86 and Arm propagate different payloads and the bits shall not depend on it. Everything is
 * written without branches on data, so that loops over it vectorise, and relies on the default floating-point
 * environment (threads.c sees to that). */
#ifndef WD_DTYPE_H
#define WD_DTYPE_H

#include <stdint.h>
#include <string.h>

static inline uint32_t wd_float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float wd_bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float wd_bf16_to_float(uint16_t half) {
  return wd_bits_float((uint32_t)half << 16);
}

static inline uint16_t wd_float_to_bf16(float value) {
  const uint32_t bits = wd_float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const int is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return (uint16_t)(is_nan ? 0x7fc0u : rounded);
}

/* The exponent moves by 112 through a multiplication, which also normalises subnormals. */
static inline float wd_f16_to_float(uint16_t half) {
  const uint32_t shifted = (uint32_t)(half & 0x7fffu) << 13;
  const uint32_t scaled = wd_float_bits(wd_bits_float(shifted) * 0x1p112f);
  const uint32_t special = shifted >= 0x7c00u << 13 ? 0x7f800000u : 0; /* infinity and NaN */
  return wd_bits_float(scaled | special | (uint32_t)(half & 0x8000u) << 16);
}

/* Three ranges: from 2^16 on infinity or NaN; from 2^-14 on a rounded shift (which carries into infinity by itself);
 * below, adding 0.5 aligns the lowest bit of the result with the lowest bit of a float, so that the addition rounds. */
static inline uint16_t wd_float_to_f16(float value) {
  const uint32_t bits = wd_float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = wd_float_bits(wd_bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t rounded = magnitude >= 0x47800000u ? special : finite;
  const uint32_t sign = magnitude > 0x7f800000u ? 0 : bits >> 16 & 0x8000u;
  return (uint16_t)(rounded | sign);
}

static inline float wd_float_to_f32(float value) {
  return value != value ? wd_bits_float(0x7fc00000u) : value;
}

#endif /* WD_DTYPE_H */
