/* isa_dots.h - the dot products of isa.h in vector registers, for an instruction set that defines, before including
 * this:
 *
 *   vec                            a register of floats
 *   VECS                           registers that hold WD_LANES floats
 *   vec_zero(), vec_load(p)        p aligned to 4 bytes
 *   vec_fma(a, b, c)               a * b + c
 *   vec_sum(acc)                   the canonical sum of acc[VECS]
 *   BLOCK_ROWS(v)                  rows that fit into the registers together with v vectors; divides WD_ROW_STEP
 *   BLOCK_VECTORS                  the most vectors of a block
 *
 * A block is a few rows times a few vectors whose accumulators stay in registers. Several rows at once keep enough
 * independent chains of fused multiply-adds going; several vectors spare loading and widening a weight again. */
#ifndef WD_ISA_DOTS_H
#define WD_ISA_DOTS_H

#include "isa_loops.h"

enum {
  BLOCK_MAX_ROWS = 4,
  /* How far ahead of their use weights are fetched into the second-level cache, at least: whole blocks of rows. Rows
   * are so short that the processor's own prefetcher, which stops at pages, finds their stride too late. Measured on
   * one core of a Xeon with AMX, Qwen3-30B-A3B at T = 1, cold: down (768 bfloat16 a row) 2.7 ms without this and 2.0 ms
   * with it, gate_up (2048) 4.2 to 4.4 and 3.4 to 4.1 ms. 4 to 16 KB and blocks of 1 to 4 rows made no difference. */
  PREFETCH_BYTES = 8192
};

/* Widens the group of weights at `group`, of which the first `count` exist, into lane order. */
typedef void load_group_fn(const char *group, int64_t count, vec lanes[VECS]);

/* Where a block of rows reads from, and whither it prefetches. */
typedef struct {
  const char *row, *ahead;
  int64_t row_bytes;
} weight_rows;

/* acc[r][v] += the group of weights at byte `offset` of row r times vectors[v][begin ..] */
WD_INLINE void dots_group(load_group_fn *load_group, weight_rows weights, int64_t offset, int64_t count,
                          const float *const *vectors, int64_t begin, int rows, int block,
                          vec acc[BLOCK_MAX_ROWS][BLOCK_VECTORS][VECS]) {
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) {
    const int64_t position = r * weights.row_bytes + offset;
    vec lanes[VECS];
    load_group(weights.row + position, count, lanes);
#pragma GCC unroll 8
    for (int v = 0; v < block; v++)
#pragma GCC unroll 8
      for (int q = 0; q < VECS; q++)
        acc[r][v][q] = vec_fma(lanes[q], vec_load(vectors[v] + begin + q * (WD_LANES / VECS)), acc[r][v][q]);
  }
}

WD_INLINE void prefetch_group(weight_rows weights, int64_t offset, int64_t bytes, int rows) {
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
    for (int64_t line = 0; line < bytes; line += 64)
      __builtin_prefetch(weights.ahead + r * weights.row_bytes + offset + line, 0, 2);
}

/* sums[v][sum_index + r] for `rows` rows times `block` vectors; both are constants where this is inlined. */
WD_INLINE void dots_block(load_group_fn *load_group, int64_t size, weight_rows weights, int64_t n,
                          const float *const *vectors, float *const *sums, int64_t sum_index, int rows, int block) {
  vec acc[BLOCK_MAX_ROWS][BLOCK_VECTORS][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < block; v++)
#pragma GCC unroll 8
      for (int q = 0; q < VECS; q++)
        acc[r][v][q] = vec_zero();
  int64_t begin = 0;
  for (; begin + WD_LANES <= n; begin += WD_LANES) {
    prefetch_group(weights, begin * size, WD_LANES * size, rows);
    dots_group(load_group, weights, begin * size, WD_LANES, vectors, begin, rows, block, acc);
  }
  if (begin < n) dots_group(load_group, weights, begin * size, n - begin, vectors, begin, rows, block, acc);
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < block; v++)
      sums[v][sum_index + r] = vec_sum(acc[r][v]);
}

/* All rows times `block` vectors. */
WD_INLINE void dots_rows(load_group_fn *load_group, int64_t size, wd_rows weights, int64_t rows, int64_t n,
                         const float *const *vectors, float *const *sums, int block) {
  const int step = BLOCK_ROWS(block);
  const char *const first = weights.first, *const next = weights.next;
  const int64_t row_bytes = weights.row_stride * size;
  const int64_t distance = (PREFETCH_BYTES + step * n * size - 1) / (step * n * size) * step;
  for (int64_t r = 0; r < rows; r += step) {
    const int64_t left = rows - r - distance;
    const weight_rows block_rows = {
        .row = first + r * row_bytes,
        .ahead = left > 0 ? first + (r + distance) * row_bytes : next - left * row_bytes,
        .row_bytes = row_bytes,
    };
    dots_block(load_group, size, block_rows, n, vectors, sums, r, step, block);
  }
}

/* A wd_dots_fn for weights of `size` bytes. */
WD_INLINE void dots(load_group_fn *load_group, int64_t size, wd_rows weights, int64_t rows, int64_t n,
                    const float *const *vectors, int32_t count, float *const *sums) {
  int32_t v = 0;
  for (; count - v >= 3; v += 3)
    dots_rows(load_group, size, weights, rows, n, vectors + v, sums + v, 3);
  if (count - v == 2) dots_rows(load_group, size, weights, rows, n, vectors + v, sums + v, 2);
  if (count - v == 1) dots_rows(load_group, size, weights, rows, n, vectors + v, sums + v, 1);
}

WD_INLINE load_group_fn load_group_f32, load_group_f16, load_group_bf16;

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

#endif /* WD_ISA_DOTS_H */
