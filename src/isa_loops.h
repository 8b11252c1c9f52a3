/* isa_loops.h - the loops around the dot products: plain C, compiled once per instruction set.
 *
 * Every isa_*.c includes this file and compiles it with its own flags, so that the compiler vectorises it; no step can
 * be contracted or reordered (-ffp-contract=off, no fast-math), so the bits are the same in all of them. */
#ifndef WD_ISA_LOOPS_H
#define WD_ISA_LOOPS_H

#ifdef __FAST_MATH__
#error "warpdecode's bits are a contract: compile without -ffast-math (-Ofast sets it)"
#endif

#include "activation.h"
#include "dtype.h"
#include "isa.h"
#include "isa_transposed.h"

static void loops_widen_f32(const void *part0, const void *part1, int64_t n, float *vector) {
  (void)part1; /* float32 has one part */
  memcpy(vector, part0, (size_t)n * sizeof *vector);
  memset(vector + n, 0, (size_t)(wd_lane_count(n) - n) * sizeof *vector);
}

static void loops_widen_f16(const void *part0, const void *part1, int64_t n, float *vector) {
  const uint16_t *const high = part0;
  const uint16_t *const low = part1;
  if (low == NULL)
    for (int64_t j = 0; j < n; j++)
      vector[j] = wd_f16_to_float(high[j]);
  else
    for (int64_t j = 0; j < n; j++)
      vector[j] = fmaf(wd_f16_to_float(low[j]), 1.0f / (1 << WD_F16_LOW_SHIFT), wd_f16_to_float(high[j]));
  memset(vector + n, 0, (size_t)(wd_lane_count(n) - n) * sizeof *vector);
}

/* Even elements to lanes 0..15 of their group, odd ones to lanes 16..31. */
static void loops_widen_bf16(const void *part0, const void *part1, int64_t n, float *vector) {
  const uint16_t *high = part0;
  const uint16_t *low = part1;
  for (int64_t begin = 0; begin < n; begin += WD_LANES, vector += WD_LANES) {
    uint16_t group[2][WD_LANES] = {{0}};
    const size_t bytes = (size_t)(n - begin < WD_LANES ? n - begin : WD_LANES) * sizeof *high;
    memcpy(group[0], high + begin, bytes);
    if (low != NULL) memcpy(group[1], low + begin, bytes);
    for (int p = 0; p < WD_LANES / 2; p++) {
      vector[p] = wd_bf16_to_float(group[0][2 * p]) + wd_bf16_to_float(group[1][2 * p]);
      vector[p + WD_LANES / 2] = wd_bf16_to_float(group[0][2 * p + 1]) + wd_bf16_to_float(group[1][2 * p + 1]);
    }
  }
}

static void loops_at_most(float *values, int64_t n, float limit) {
  for (int64_t j = 0; j < n; j++)
    values[j] = values[j] > limit ? limit : values[j]; /* a NaN stays one */
}

/* Loop after loop over a tile, which the first-level cache holds, so that each vectorises by itself. */
static void loops_glu(float *gate, float *up, int64_t n, const wd_gating *gating) {
  loops_at_most(gate, n, gating->limit_before);
  switch (gating->activation) {
  case WD_ACTIVATION_SILU:
    for (int64_t j = 0; j < n; j++)
      gate[j] = wd_silu(gate[j], gating->alpha);
    break;
  case WD_ACTIVATION_GELU_TANH:
    for (int64_t j = 0; j < n; j++)
      gate[j] = wd_gelu_tanh(gate[j]);
    break;
  case WD_ACTIVATION_GELU:
    for (int64_t j = 0; j < n; j++)
      gate[j] = wd_gelu(gate[j]);
    break;
  case WD_ACTIVATION_RELU:
    for (int64_t j = 0; j < n; j++)
      gate[j] = wd_relu(gate[j]);
    break;
  default:
    for (int64_t j = 0; j < n; j++)
      gate[j] = wd_relu2(gate[j]);
  }
  loops_at_most(gate, n, gating->limit_after);
  if (!gating->has_up) return;
  loops_at_most(up, n, gating->up_limit);
  for (int64_t j = 0; j < n; j++)
    up[j] = up[j] < -gating->up_limit ? -gating->up_limit : up[j];
  for (int64_t j = 0; j < n; j++)
    gate[j] *= up[j] + gating->up_offset;
}

/* What part0 lost: value - part0, or 0 where part0 is not finite. */
static inline float loops_remainder(float value, float part0) {
  const float remainder = value - part0;
  return fabsf(part0) < INFINITY ? remainder : 0.0f;
}

static void loops_split_f32(const float *value, int64_t n, void *part0, void *part1) {
  (void)part1;
  float *const high = part0;
  for (int64_t j = 0; j < n; j++)
    high[j] = wd_float_to_f32(value[j]);
}

static void loops_split_f16(const float *value, int64_t n, void *part0, void *part1) {
  uint16_t *const high = part0;
  uint16_t *const low = part1;
  for (int64_t j = 0; j < n; j++) {
    high[j] = wd_float_to_f16(value[j]);
    low[j] = wd_float_to_f16(loops_remainder(value[j], wd_f16_to_float(high[j])) * (1 << WD_F16_LOW_SHIFT));
  }
}

static void loops_split_bf16(const float *value, int64_t n, void *part0, void *part1) {
  uint16_t *const high = part0;
  uint16_t *const low = part1;
  for (int64_t j = 0; j < n; j++) {
    high[j] = wd_float_to_bf16(value[j]);
    low[j] = wd_float_to_bf16(loops_remainder(value[j], wd_bf16_to_float(high[j])));
  }
}

static void loops_add_scaled(float weight, const float *term, int64_t n, float *sum) {
  for (int64_t j = 0; j < n; j++)
    sum[j] = fmaf(weight, term[j], sum[j]);
}

static void loops_narrow_f32(const float *sum, int64_t n, void *output) {
  float *const values = output;
  for (int64_t j = 0; j < n; j++)
    values[j] = wd_float_to_f32(sum[j]);
}

static void loops_narrow_f16(const float *sum, int64_t n, void *output) {
  uint16_t *const values = output;
  for (int64_t j = 0; j < n; j++)
    values[j] = wd_float_to_f16(sum[j]);
}

static void loops_narrow_bf16(const float *sum, int64_t n, void *output) {
  uint16_t *const values = output;
  for (int64_t j = 0; j < n; j++)
    values[j] = wd_float_to_bf16(sum[j]);
}

/* Two sums of a cache line each, in the widest registers of the instruction set; every line is prefetched 2 KB ahead,
 * as the kernels do. Two cores of a Xeon, cold memory: 4.5 ms for 75 MB in AVX-512 and 5.2 in SSE2 while others
 * read, 2.6 and 2.75 in quiet. Other distances (4 to 16 KB), four sums, and 2 to 16 streams at once were no faster. */
static uint64_t loops_read(const uint64_t *words, size_t count) {
  typedef uint64_t line __attribute__((vector_size(64), aligned(8), may_alias));
  enum { LINE_WORDS = 8, AHEAD_WORDS = 32 * LINE_WORDS };
  line sum[2] = {{0}, {0}};
  size_t i = 0;
  for (; i + 2 * LINE_WORDS <= count; i += 2 * LINE_WORDS) {
    __builtin_prefetch(words + i + AHEAD_WORDS, 0, 2);
    __builtin_prefetch(words + i + LINE_WORDS + AHEAD_WORDS, 0, 2);
    sum[0] ^= *(const line *)(words + i);
    sum[1] ^= *(const line *)(words + i + LINE_WORDS);
  }
  uint64_t all = 0;
  for (int j = 0; j < LINE_WORDS; j++)
    all ^= sum[0][j] ^ sum[1][j];
  for (; i < count; i++)
    all ^= words[i];
  return all;
}

/* The initialiser of wd_cpu_isa.loops around three dot products. */
#define WD_ISA_LOOPS(dots_f32, dots_f16, dots_bf16)                                                                    \
  {                                                                                                                    \
      [WD_F32] = {loops_widen_f32, dots_f32, transposed_f32, loops_split_f32, loops_narrow_f32},                       \
      [WD_F16] = {loops_widen_f16, dots_f16, transposed_f16, loops_split_f16, loops_narrow_f16},                       \
      [WD_BF16] = {loops_widen_bf16, dots_bf16, transposed_bf16, loops_split_bf16, loops_narrow_bf16},                 \
  }

#endif /* WD_ISA_LOOPS_H */
