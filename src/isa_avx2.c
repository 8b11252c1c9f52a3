/* isa_avx2.c - the inner loops in AVX2, FMA and F16C: 32 lanes are four registers. */
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

typedef __m256 vec;
enum { VECS = 4 };
/* 16 registers: 8 accumulators of 2 x 1 or 12 of 1 x 3, 4 of weights; activations are operands in memory. */
#define BLOCK_VECTORS 3
#define BLOCK_ROWS(vectors) ((vectors) == 1 ? 2 : 1)

static inline vec vec_zero(void) {
  return _mm256_setzero_ps();
}

static inline vec vec_load(const float *p) {
  return _mm256_loadu_ps(p);
}

static inline vec vec_fma(vec a, vec b, vec c) {
  return _mm256_fmadd_ps(a, b, c);
}

static inline float vec_sum(const vec acc[VECS]) {
  const __m256 sum8 = _mm256_add_ps(_mm256_add_ps(acc[0], acc[2]), _mm256_add_ps(acc[1], acc[3]));
  const __m128 sum4 = _mm_add_ps(_mm256_castps256_ps128(sum8), _mm256_extractf128_ps(sum8, 1));
  const __m128 sum2 = _mm_add_ps(sum4, _mm_movehl_ps(sum4, sum4));
  return _mm_cvtss_f32(_mm_add_ss(sum2, _mm_movehdup_ps(sum2)));
}

#include "isa_dots.h"

/* 16 halves from `group` on, of which `count` exist: 8 or none when they are not 16 (n is a multiple of 8). */
static inline __m256i load_16_halves(const char *group, int64_t count) {
  if (count >= 16) return _mm256_loadu_si256((const __m256i *)(const void *)group);
  if (count >= 8) return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)group));
  return _mm256_setzero_si256();
}

WD_INLINE void load_group_f32(const char *group, int64_t count, vec lanes[VECS]) {
  for (int q = 0; q < VECS; q++)
    lanes[q] = 8 * q < count ? _mm256_loadu_ps((const float *)(const void *)group + 8 * q) : _mm256_setzero_ps();
}

WD_INLINE void load_group_f16(const char *group, int64_t count, vec lanes[VECS]) {
  for (int half = 0; half < 2; half++) {
    const __m256i halves = load_16_halves(group + 32 * half, count - 16 * half);
    lanes[2 * half] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    lanes[2 * half + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }
}

/* The even elements of the first and second half are lanes 0..7 and 8..15, the odd ones 16..23 and 24..31. */
WD_INLINE void load_group_bf16(const char *group, int64_t count, vec lanes[VECS]) {
  for (int half = 0; half < 2; half++) {
    const __m256i halves = load_16_halves(group + 32 * half, count - 16 * half);
    lanes[half] = _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
    lanes[half + 2] = _mm256_castsi256_ps(_mm256_and_si256(halves, _mm256_set1_epi32((int)0xffff0000u)));
  }
}

const struct wd_cpu_isa wd_isa_avx2 = {
    .name = "cpu_avx2",
    .description = "x86-64 with AVX2, FMA and F16C",
    .glu = loops_glu,
    .add_scaled = loops_add_scaled,
    .read = loops_read,
    .loops = WD_ISA_LOOPS(dots_f32, dots_f16, dots_bf16),
};
#endif
