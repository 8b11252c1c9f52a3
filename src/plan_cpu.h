/* plan_cpu.h - what both CPU drivers share: their scratch, cut up, the routes sorted by expert, and where an expert's
 * weights lie in each layout. */
#ifndef WD_PLAN_CPU_H
#define WD_PLAN_CPU_H

#include "dtype.h"
#include "isa.h"

typedef struct {
  int64_t routes;        /* number of valid routes: those whose id is in [0, E) */
  int32_t experts;       /* number of distinct experts among them */
  const int32_t *expert; /* [experts] their ids, ascending */
  const int32_t *begin;  /* [experts + 1] the routes of expert[a] are route[begin[a] .. begin[a + 1]) */
  const int32_t *route;  /* [routes] token * K + slot, ascending within an expert */
  float *vectors;        /* [T, wd_lane_count(H)] or [T * K, wd_lane_count(I)]: activations as isa.h wants them */
  float *sums;           /* [T * K, H]: down alone */
} wd_cpu_plan;

/* Sorts the routes of a call into its scratch. */
wd_cpu_plan wd_cpu_plan_make(const wd_moe_shape *shape, const void *topk_ids, void *scratch);

/* topk_ids[route], or -1 if it is outside [0, E). */
static inline int32_t wd_cpu_expert_of(const wd_moe_shape *shape, const void *topk_ids, int64_t route) {
  const int64_t id =
      shape->id_bytes == 8 ? ((const int64_t *)topk_ids)[route] : (int64_t)((const int32_t *)topk_ids)[route];
  return id >= 0 && id < shape->experts ? (int32_t)id : -1;
}

/* Element `index` of an array, as a float. */
static inline float wd_cpu_float_at(const void *values, wd_dtype dtype, int64_t index) {
  switch (dtype) {
  case WD_F16:
    return wd_f16_to_float(((const uint16_t *)values)[index]);
  case WD_BF16:
    return wd_bf16_to_float(((const uint16_t *)values)[index]);
  default:
    return ((const float *)values)[index];
  }
}

/* The first element of an expert: of a matrix's, or of its biases. */
static inline const char *wd_cpu_expert_at(const void *data, const uint64_t *pointers, int64_t stride, wd_dtype dtype,
                                           int32_t expert) {
  return pointers != NULL ? (const char *)(uintptr_t)pointers[expert]
                          : (const char *)data + expert * stride * (int64_t)wd_dtype_size(dtype);
}

/* Element 0 of a row of an expert's matrix. */
static inline const char *wd_cpu_row_at(const wd_matrix *matrix, wd_dtype dtype, int32_t expert, int64_t row) {
  return wd_cpu_expert_at(matrix->data, matrix->pointers, matrix->expert_stride, dtype, expert) +
         (matrix->offset + row * matrix->row_stride) * (int64_t)wd_dtype_size(dtype);
}

/* The dot products of isa.h with rows of `matrix`, whose element 0 of row 0 is `first`; `next` is that of the rows of
 * the same strides which come after these. */
static inline void wd_cpu_dots(const wd_isa_loops *loops, const wd_matrix *matrix, const char *first, const char *next,
                               int64_t rows, int64_t n, const float *const *vectors, int32_t count,
                               float *const *sums) {
  const wd_rows weights = {
      .first = first, .next = next, .row_stride = matrix->row_stride, .k_stride = matrix->k_stride};
  (matrix->k_stride == 1 ? loops->dots : loops->dots_transposed)(weights, rows, n, vectors, count, sums);
}

/* The biases of rows [row, row + rows) of an expert, as floats in values[]; NULL where there are none. */
static inline const float *wd_cpu_bias(const wd_bias *bias, int32_t expert, int64_t row, int64_t rows, float *values) {
  if (!wd_bias_given(bias)) return NULL;
  const char *const first = wd_cpu_expert_at(bias->data, bias->pointers, bias->expert_stride, bias->dtype, expert);
  for (int64_t j = 0; j < rows; j++)
    values[j] = wd_cpu_float_at(first, bias->dtype, bias->offset + (row + j) * bias->row_stride);
  return values;
}

/* sums[j] += bias[j]: one addition to a finished sum; none where bias is NULL. */
static inline void wd_cpu_add_bias(float *sums, const float *bias, int64_t rows) {
  if (bias == NULL) return;
  for (int64_t j = 0; j < rows; j++)
    sums[j] += bias[j];
}

/* `threads`, or NULL where the work is too small to be shared: `products` multiplications of a weight. */
wd_threads *wd_cpu_worthwhile(wd_threads *threads, int64_t products);

/* How many of `rows` weight rows one work item takes, when every tile of rows makes `items_per_tile` items: a multiple
 * of WD_ROW_STEP, at most WD_MAX_TILE. It does not touch the bits. */
enum { WD_MAX_TILE = 64 };
int64_t wd_cpu_tile(int64_t rows, int64_t items_per_tile, int32_t workers);

#endif /* WD_PLAN_CPU_H */
