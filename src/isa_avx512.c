/* isa_avx512.c - the inner loops in AVX-512 (F, BW, VL, DQ): 32 lanes are two registers.
 *
 * AVX512-BF16 is left out: its vdpbf16ps takes subnormals for zeros, so its bits differ, and it gains nothing. With
 * cached weights it reached 51 G products a second on a core where these loops reach 57, half of that with the two
 * parts that down needs; with weights from memory both wait for them. */
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

typedef __m512 vec;
enum { VECS = 2 };
/* 24 accumulators of 4 x 3, 6 registers of activations, 2 of weights: all 32 registers. */
#define BLOCK_VECTORS 3
#define BLOCK_ROWS(vectors) 4

static inline vec vec_zero(void) {
  return _mm512_setzero_ps();
}

static inline vec vec_load(const float *p) {
  return _mm512_loadu_ps(p);
}

static inline vec vec_fma(vec a, vec b, vec c) {
  return _mm512_fmadd_ps(a, b, c);
}

static inline float vec_sum(const vec acc[VECS]) {
  const __m512 sum16 = _mm512_add_ps(acc[0], acc[1]);
  const __m256 sum8 = _mm256_add_ps(_mm512_castps512_ps256(sum16), _mm512_extractf32x8_ps(sum16, 1));
  const __m128 sum4 = _mm_add_ps(_mm256_castps256_ps128(sum8), _mm256_extractf128_ps(sum8, 1));
  const __m128 sum2 = _mm_add_ps(sum4, _mm_movehl_ps(sum4, sum4));
  return _mm_cvtss_f32(_mm_add_ss(sum2, _mm_movehdup_ps(sum2)));
}

#include "isa_dots.h"

static __mmask32 first(int64_t count) {
  return (__mmask32)((1ull << count) - 1);
}

WD_INLINE void load_group_f32(const char *group, int64_t count, vec lanes[VECS]) {
  if (count == WD_LANES) {
    lanes[0] = _mm512_loadu_ps(group);
    lanes[1] = _mm512_loadu_ps(group + 64);
  } else {
    const __mmask32 mask = first(count);
    lanes[0] = _mm512_maskz_loadu_ps((__mmask16)mask, group);
    lanes[1] = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), group + 64);
  }
}

WD_INLINE void load_group_f16(const char *group, int64_t count, vec lanes[VECS]) {
  const __m512i halves = count == WD_LANES ? _mm512_loadu_si512(group) : _mm512_maskz_loadu_epi16(first(count), group);
  lanes[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  lanes[1] = _mm512_cvtph_ps(_mm512_extracti32x8_epi32(halves, 1));
}

WD_INLINE void load_group_bf16(const char *group, int64_t count, vec lanes[VECS]) {
  const __m512i halves = count == WD_LANES ? _mm512_loadu_si512(group) : _mm512_maskz_loadu_epi16(first(count), group);
  lanes[0] = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
  lanes[1] = _mm512_castsi512_ps(_mm512_maskz_mov_epi16(0xaaaaaaaau, halves));
}

const struct wd_cpu_isa wd_isa_avx512 = {
    .name = "cpu_avx512",
    .description = "x86-64 with AVX-512 F, BW, VL and DQ",
    .glu = loops_glu,
    .add_scaled = loops_add_scaled,
    .read = loops_read,
    .loops = WD_ISA_LOOPS(dots_f32, dots_f16, dots_bf16),
};
#endif
