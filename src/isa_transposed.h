/* isa_transposed.h - the dot products of isa.h where the rows of weights lie side by side: [.., n, rows] in memory.
 *
 * The loads run along the rows, which are neighbours, instead of along k: a block of rows shares each step of k. The
 * sums are the canonical ones: element k goes to its lane, every lane of every row is a sum of its own, in memory, and
 * the lanes are added in the same tree. Plain C, vectorised by the compiler, as the rest of isa_loops.h. */
#ifndef WD_ISA_TRANSPOSED_H
#define WD_ISA_TRANSPOSED_H

#include "dtype.h"
#include "isa.h"
#include <math.h>

enum {
  TRANSPOSED_ROWS = 64, /* of a block: two cache lines of two-byte weights, which a processor fetches together */
  /* Of a block: 32 KB of sums. Hot weights on one core of a Xeon with AMX, bfloat16, 16 vectors: blocks of 64 x 4 22 G
   * products a second, 64 x 2 15, 32 x 4 19; weights from memory, one vector: 4.5 to 4.7 GB/s, 32 x 4 3.7. */
  TRANSPOSED_VECTORS = 4,
  /* Steps of k that weights are fetched ahead: each is another page, so the processor does not guess them. */
  TRANSPOSED_AHEAD = 16
};

/* wide[j] = weights[j]; rows and dtype are constants where this is inlined. */
WD_INLINE void transposed_widen(const void *weights, int rows, wd_dtype dtype, float *wide) {
  const float *const words = weights;
  const uint16_t *const halves = weights;
  for (int j = 0; j < rows; j++)
    wide[j] = dtype == WD_F32 ? words[j] : dtype == WD_F16 ? wd_f16_to_float(halves[j]) : wd_bf16_to_float(halves[j]);
}

/* sums[v][row_index + j] for a block of `rows` rows times `block` vectors. */
WD_INLINE void transposed_block(const char *weights, int64_t step_bytes, int64_t n, const float *const *vectors,
                                float *const *sums, int64_t row_index, int rows, int block, wd_dtype dtype) {
  float acc[TRANSPOSED_VECTORS][WD_LANES][TRANSPOSED_ROWS];
  memset(acc, 0, (size_t)block * sizeof acc[0]);
  for (int64_t begin = 0; begin < n; begin += WD_LANES)
    for (int e = 0; e < WD_LANES; e++) {
      const int64_t k = begin + e;
      const int p = dtype != WD_BF16 ? e : e / 2 + e % 2 * (WD_LANES / 2);
      float wide[TRANSPOSED_ROWS] = {0}; /* beyond n: zeros, which the vectors have there, too */
      if (k < n) {
        for (int64_t line = 0; line < rows * (dtype == WD_F32 ? 4 : 2); line += 64)
          __builtin_prefetch(weights + (k + TRANSPOSED_AHEAD) * step_bytes + line, 0, 2);
        transposed_widen(weights + k * step_bytes, rows, dtype, wide);
      }
      for (int v = 0; v < block; v++)
        for (int j = 0; j < rows; j++)
          acc[v][p][j] = fmaf(wide[j], vectors[v][begin + p], acc[v][p][j]);
    }
  for (int v = 0; v < block; v++) {
    for (int step = WD_LANES / 2; step > 0; step /= 2)
      for (int p = 0; p < step; p++)
        for (int j = 0; j < rows; j++)
          acc[v][p][j] += acc[v][p + step][j];
    memcpy(sums[v] + row_index, acc[v][0], (size_t)rows * sizeof(float));
  }
}

/* All rows times `block` vectors. */
WD_INLINE void transposed_rows(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors,
                               float *const *sums, int block, wd_dtype dtype) {
  const int64_t size = dtype == WD_F32 ? 4 : 2, step_bytes = weights.k_stride * size;
  const char *const first = weights.first;
  int64_t r = 0;
  for (; r + TRANSPOSED_ROWS <= rows; r += TRANSPOSED_ROWS)
    transposed_block(first + r * size, step_bytes, n, vectors, sums, r, TRANSPOSED_ROWS, block, dtype);
  for (; r + TRANSPOSED_ROWS / 2 <= rows; r += TRANSPOSED_ROWS / 2)
    transposed_block(first + r * size, step_bytes, n, vectors, sums, r, TRANSPOSED_ROWS / 2, block, dtype);
  for (; r < rows; r += WD_ROW_STEP)
    transposed_block(first + r * size, step_bytes, n, vectors, sums, r, WD_ROW_STEP, block, dtype);
}

/* A wd_dots_fn; dtype is a constant where this is inlined. */
WD_INLINE void transposed(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                          float *const *sums, wd_dtype dtype) {
  int32_t v = 0;
  for (; count - v >= TRANSPOSED_VECTORS; v += TRANSPOSED_VECTORS)
    transposed_rows(weights, rows, n, vectors + v, sums + v, TRANSPOSED_VECTORS, dtype);
  for (; count - v >= 2; v += 2)
    transposed_rows(weights, rows, n, vectors + v, sums + v, 2, dtype);
  if (v < count) transposed_rows(weights, rows, n, vectors + v, sums + v, 1, dtype);
}

static void transposed_f32(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                           float *const *sums) {
  transposed(weights, rows, n, vectors, count, sums, WD_F32);
}

static void transposed_f16(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                           float *const *sums) {
  transposed(weights, rows, n, vectors, count, sums, WD_F16);
}

static void transposed_bf16(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                            float *const *sums) {
  transposed(weights, rows, n, vectors, count, sums, WD_BF16);
}

#endif /* WD_ISA_TRANSPOSED_H */
