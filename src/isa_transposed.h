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
  TRANSPOSED_ROWS = 32,   /* of a block: a cache line of two-byte weights */
  TRANSPOSED_VECTORS = 2, /* of a block: 8 KB of sums, which the first-level cache holds */
  /* Steps of k that weights are fetched ahead: each is another page, so the processor does not guess them. */
  TRANSPOSED_AHEAD = 16
};

/* wide[j] = weights[j * row_stride] for a block of `rows`; all but weights and wide are constants where this is
 * inlined. */
WD_INLINE void transposed_widen(const void *weights, int64_t row_stride, int rows, wd_dtype dtype, float *wide) {
  const float *const words = weights;
  const uint16_t *const halves = weights;
  for (int j = 0; j < rows; j++)
    wide[j] = dtype == WD_F32   ? words[j * row_stride]
              : dtype == WD_F16 ? wd_f16_to_float(halves[j * row_stride])
                                : wd_bf16_to_float(halves[j * row_stride]);
}

/* sums[v][row_index + j] for a block of `rows` rows times `block` vectors. */
WD_INLINE void transposed_block(const char *weights, int64_t row_stride, int64_t k_stride, int64_t n,
                                const float *const *vectors, float *const *sums, int64_t row_index, int rows, int block,
                                wd_dtype dtype) {
  const int64_t size = dtype == WD_F32 ? 4 : 2;
  float acc[TRANSPOSED_VECTORS][WD_LANES][TRANSPOSED_ROWS];
  memset(acc, 0, sizeof acc);
  for (int64_t begin = 0; begin < n; begin += WD_LANES)
    for (int e = 0; e < WD_LANES; e++) {
      const int64_t k = begin + e;
      const int p = dtype != WD_BF16 ? e : e / 2 + e % 2 * (WD_LANES / 2);
      float wide[TRANSPOSED_ROWS] = {0}; /* beyond n: zeros, which the vectors have there, too */
      if (k < n) {
        for (int64_t line = 0; line < rows * row_stride * size; line += 64)
          __builtin_prefetch(weights + (k + TRANSPOSED_AHEAD) * k_stride * size + line, 0, 2);
        transposed_widen(weights + k * k_stride * size, row_stride, rows, dtype, wide);
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
WD_INLINE void transposed_rows(wd_rows weights, int64_t row_stride, int64_t rows, int64_t n,
                               const float *const *vectors, float *const *sums, int block, wd_dtype dtype) {
  const int64_t row_bytes = row_stride * (dtype == WD_F32 ? 4 : 2);
  const char *const first = weights.first;
  int64_t r = 0;
  for (; r + TRANSPOSED_ROWS <= rows; r += TRANSPOSED_ROWS)
    transposed_block(first + r * row_bytes, row_stride, weights.k_stride, n, vectors, sums, r, TRANSPOSED_ROWS, block,
                     dtype);
  for (; r < rows; r += WD_ROW_STEP)
    transposed_block(first + r * row_bytes, row_stride, weights.k_stride, n, vectors, sums, r, WD_ROW_STEP, block,
                     dtype);
}

/* A wd_dots_fn; row_stride and dtype are constants where this is inlined. */
WD_INLINE void transposed_stride(wd_rows weights, int64_t row_stride, int64_t rows, int64_t n,
                                 const float *const *vectors, int32_t count, float *const *sums, wd_dtype dtype) {
  int32_t v = 0;
  for (; count - v >= TRANSPOSED_VECTORS; v += TRANSPOSED_VECTORS)
    transposed_rows(weights, row_stride, rows, n, vectors + v, sums + v, TRANSPOSED_VECTORS, dtype);
  if (v < count) transposed_rows(weights, row_stride, rows, n, vectors + v, sums + v, 1, dtype);
}

WD_INLINE void transposed(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                          float *const *sums, wd_dtype dtype) {
  if (weights.row_stride == 1)
    transposed_stride(weights, 1, rows, n, vectors, count, sums, dtype);
  else
    transposed_stride(weights, 2, rows, n, vectors, count, sums, dtype);
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
