/* isa_neon.c - the inner loops in Advanced SIMD of AArch64, which every such processor has: 32 lanes are eight
 * registers. */
#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

typedef float32x4_t vec;
enum { VECS = 8 };
/* 32 registers: 16 accumulators of 2 x 1 or 24 of 1 x 3, and the weights. */
#define BLOCK_VECTORS 3
#define BLOCK_ROWS(vectors) ((vectors) == 1 ? 2 : 1)

static inline vec vec_zero(void) {
  return vdupq_n_f32(0);
}

static inline vec vec_load(const float *p) {
  return vld1q_f32(p);
}

static inline vec vec_fma(vec a, vec b, vec c) {
  return vfmaq_f32(c, a, b);
}

static inline float vec_sum(const vec acc[VECS]) {
  vec sum16[4];
  for (int q = 0; q < 4; q++)
    sum16[q] = vaddq_f32(acc[q], acc[q + 4]);
  const vec sum4 = vaddq_f32(vaddq_f32(sum16[0], sum16[2]), vaddq_f32(sum16[1], sum16[3]));
  const float32x2_t sum2 = vadd_f32(vget_low_f32(sum4), vget_high_f32(sum4));
  return vget_lane_f32(sum2, 0) + vget_lane_f32(sum2, 1);
}

#include "isa_dots.h"

/* 8 halves, or zeros past the end (n is a multiple of 8). */
static inline uint16x8_t load_8_halves(const char *group, int exists) {
  return exists ? vld1q_u16((const uint16_t *)(const void *)group) : vdupq_n_u16(0);
}

WD_INLINE void load_group_f32(const char *group, int64_t count, vec lanes[VECS]) {
  for (int q = 0; q < VECS; q++)
    lanes[q] = 4 * q < count ? vld1q_f32((const float *)(const void *)group + 4 * q) : vdupq_n_f32(0);
}

WD_INLINE void load_group_f16(const char *group, int64_t count, vec lanes[VECS]) {
  for (int q = 0; q < 4; q++) {
    const uint16x8_t halves = load_8_halves(group + 16 * q, 8 * q < count);
    lanes[2 * q] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves)));
    lanes[2 * q + 1] = vcvt_high_f32_f16(vreinterpretq_f16_u16(halves));
  }
}

/* The even elements of quarter q are lanes 4 q .. 4 q + 3, the odd ones 16 lanes later. */
WD_INLINE void load_group_bf16(const char *group, int64_t count, vec lanes[VECS]) {
  for (int q = 0; q < 4; q++) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(load_8_halves(group + 16 * q, 8 * q < count));
    lanes[q] = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
    lanes[q + 4] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
  }
}

const struct wd_cpu_isa wd_isa_neon = {
    .name = "cpu_neon",
    .description = "AArch64 with Advanced SIMD",
    .glu = loops_glu,
    .add_scaled = loops_add_scaled,
    .read = loops_read,
    .loops = WD_ISA_LOOPS(dots_f32, dots_f16, dots_bf16),
};
#endif
