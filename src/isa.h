/* isa.h - the inner loops of one instruction set, and the one arithmetic they all share.
 *
 * The canonical dot product, for a weight row w and an activation vector x of n elements (n a multiple of 8):
 *
 *   Elements are taken in groups of 32, the last group filled up with zeros on both sides. Within a group an element
 * has a lane p in 0..31: its own index for float16 and float32; for bfloat16 the even elements come first (0, 2, .. 30,
 * then 1, 3, .. 31), because that is how two instructions widen 32 of them (a shift and a mask). acc[p] = fmaf(w, x,
 * acc[p]), groups in ascending order, acc[p] starting from 0. Then acc[p] += acc[p + s] for s = 16, 8, 4, 2, 1; the sum
 * is acc[0].
 *
 * 32 lanes are 2 registers of AVX-512, 4 of AVX2, 8 of NEON. The sum of one row and one vector depends on nothing else,
 * so any number of rows and vectors may be worked on together.
 *
 * Activation vectors are floats in lane order, filled up to a multiple of 32 (wd_lane_count), so that the inner loop
 * loads them as they are. Weights are read where they lie and never past their end. */
#ifndef WD_ISA_H
#define WD_ISA_H

#include "args.h"
#include "cpu.h"

/* For loops whose parameters are constants at the place where they are inlined. */
#define WD_INLINE static inline __attribute__((always_inline))

enum {
  WD_LANES = 32,
  WD_ROW_STEP = 8,    /* numbers of rows are multiples of this (because H and I are) */
  WD_MAX_VECTORS = 24 /* activation vectors of one call of dots */
};

static inline int64_t wd_lane_count(int64_t n) {
  return (n + WD_LANES - 1) / WD_LANES * WD_LANES;
}

/* vector[0 .. wd_lane_count(n)) = part0[j] + part1[j] * 2^-S (args.h) in lane order; part1 NULL: part0 alone. */
typedef void wd_widen_fn(const void *part0, const void *part1, int64_t n, float *vector);

/* Rows of weights: element k of row r lies r * row_stride + k * k_stride elements behind `first`. `next` is where rows
 * of the same strides will be read after these, a hint that is never dereferenced. */
typedef struct {
  const void *first, *next;
  int64_t row_stride, k_stride;
} wd_rows;

/* sums[v][r] = weights[r, :] . vectors[v], r < rows (a multiple of WD_ROW_STEP), v < count <= WD_MAX_VECTORS. `dots` is
 * for k_stride 1, `dots_transposed` for any other, with row_stride 1. */
typedef void wd_dots_fn(wd_rows weights, int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                        float *const *sums);

/* gate[j] = the value that gate[j] and up[j] become (args.h); up[j] is overwritten. */
typedef void wd_glu_fn(float *gate, float *up, int64_t n, const wd_gating *gating);

/* part0[j] + part1[j] * 2^-S = value[j], rounded as warpdecode.h says; part1 is NULL for float32. */
typedef void wd_split_fn(const float *value, int64_t n, void *part0, void *part1);

/* sum[j] = fmaf(weight, term[j], sum[j]) */
typedef void wd_add_scaled_fn(float weight, const float *term, int64_t n, float *sum);

/* output[j] = sum[j] rounded */
typedef void wd_narrow_fn(const float *sum, int64_t n, void *output);

/* The xor of `count` words: a plain read of memory (read_cpu.c). */
typedef uint64_t wd_read_fn(const uint64_t *words, size_t count);

/* The loops that depend on the dtype. */
typedef struct {
  wd_widen_fn *widen;
  wd_dots_fn *dots, *dots_transposed;
  wd_split_fn *split;
  wd_narrow_fn *narrow;
} wd_isa_loops;

struct wd_cpu_isa {
  const char *name;
  const char *description;
  wd_glu_fn *glu;
  wd_add_scaled_fn *add_scaled;
  wd_read_fn *read;
  wd_isa_loops loops[3]; /* by wd_dtype */
};

/* The rows of the table (cpu_table.c), one per file isa_*.c. A file compiled for another architecture has none. */
extern const struct wd_cpu_isa wd_isa_generic;
#if defined(__x86_64__)
extern const struct wd_cpu_isa wd_isa_avx2;
extern const struct wd_cpu_isa wd_isa_avx512;
#elif defined(__aarch64__)
extern const struct wd_cpu_isa wd_isa_neon;
#endif

#endif /* WD_ISA_H */
