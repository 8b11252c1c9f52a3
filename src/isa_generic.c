/* isa_generic.c - the dot products in plain C: every machine can run it, and it is the readable version of isa.h.
 *
 * fmaf is exact about its single rounding on machines without the instruction, too, only slow. */
#include "isa_loops.h"

/* The 32 weights from `row + begin` on, in lane order; `count` of them exist. */
typedef void load_group_fn(const void *row, int64_t begin, int64_t count, float group[WD_LANES]);

static void load_group_f32(const void *row, int64_t begin, int64_t count, float group[WD_LANES]) {
  const float *const weights = (const float *)row + begin;
  for (int p = 0; p < WD_LANES; p++)
    group[p] = p < count ? weights[p] : 0.0f;
}

static void load_group_f16(const void *row, int64_t begin, int64_t count, float group[WD_LANES]) {
  const uint16_t *const weights = (const uint16_t *)row + begin;
  for (int p = 0; p < WD_LANES; p++)
    group[p] = p < count ? wd_f16_to_float(weights[p]) : 0.0f;
}

static void load_group_bf16(const void *row, int64_t begin, int64_t count, float group[WD_LANES]) {
  const uint16_t *const weights = (const uint16_t *)row + begin;
  for (int p = 0; p < WD_LANES; p++) {
    const int j = p < WD_LANES / 2 ? 2 * p : 2 * (p - WD_LANES / 2) + 1;
    group[p] = j < count ? wd_bf16_to_float(weights[j]) : 0.0f;
  }
}

static inline void dots(load_group_fn *load_group, size_t weight_bytes, wd_rows weights, int64_t rows, int64_t n,
                        const float *const *vectors, int32_t count, float *const *sums) {
  for (int64_t r = 0; r < rows; r++) {
    const void *const row = (const char *)weights.first + (size_t)(r * weights.row_stride) * weight_bytes;
    float acc[WD_MAX_VECTORS][WD_LANES];
    memset(acc, 0, (size_t)count * sizeof acc[0]);
    for (int64_t begin = 0; begin < n; begin += WD_LANES) {
      float group[WD_LANES];
      load_group(row, begin, n - begin, group);
      for (int32_t v = 0; v < count; v++)
        for (int p = 0; p < WD_LANES; p++)
          acc[v][p] = fmaf(group[p], vectors[v][begin + p], acc[v][p]);
    }
    for (int32_t v = 0; v < count; v++) {
      for (int step = WD_LANES / 2; step > 0; step /= 2)
        for (int p = 0; p < step; p++)
          acc[v][p] += acc[v][p + step];
      sums[v][r] = acc[v][0];
    }
  }
}

static void dots_f32(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                     float *const *sums) {
  dots(load_group_f32, sizeof(float), weights, rows, n, vectors, count, sums);
}

static void dots_f16(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                     float *const *sums) {
  dots(load_group_f16, sizeof(uint16_t), weights, rows, n, vectors, count, sums);
}

static void dots_bf16(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                      float *const *sums) {
  dots(load_group_bf16, sizeof(uint16_t), weights, rows, n, vectors, count, sums);
}

const struct wd_cpu_isa wd_isa_generic = {
    .name = "cpu_generic",
    .description = "plain C, any CPU",
    .glu = loops_glu,
    .add_scaled = loops_add_scaled,
    .read = loops_read,
    .loops = WD_ISA_LOOPS(dots_f32, dots_f16, dots_bf16),
};
