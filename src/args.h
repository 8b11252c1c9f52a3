/* args.h - what a kernel sees: plain pointers and numbers, already checked. Compiled by the C compiler and by nvcc.
 *
 * Shapes stand behind the pointers. Letters as in warpdecode.h: T tokens, K slots, E experts, H hidden size, I
 * intermediate size. Sizes are elements unless a name says bytes. */
#ifndef WD_ARGS_H
#define WD_ARGS_H

#include <stddef.h>
#include <stdint.h>

typedef enum { WD_F32, WD_F16, WD_BF16 } wd_dtype;

/* Bytes of one element. */
static inline size_t wd_dtype_size(wd_dtype dtype) {
  return dtype == WD_F32 ? 4 : 2;
}

/* Parts P of the intermediate, and S: value = part 0 + part 1 * 2^-S (warpdecode.h, wd_moe_gate_up_3d_batched). The
 * remainder of a float16 is scaled because unscaled it would sink into the subnormals and lose the bits it is for. */
static inline int wd_intermediate_parts(wd_dtype dtype) {
  return dtype == WD_F32 ? 1 : 2;
}
#define WD_F16_LOW_SHIFT 11

typedef struct {
  int64_t tokens;       /* T, of this pass */
  int32_t top_k;        /* K */
  int32_t experts;      /* E */
  int32_t hidden;       /* H, a multiple of 8 */
  int32_t intermediate; /* I, a multiple of 8 */
  wd_dtype dtype;       /* of hidden_states, weights, intermediate, output */
  int32_t id_bytes;     /* 4 or 8: topk_ids are int32 or int64 */
  int32_t scattered;    /* 1: some experts' weights have addresses of their own */
  int32_t transposed;   /* 1: some weights are transposed */
  int32_t kept;         /* CUDA's own, 1: what a call writes and reads again has room in the L2 cache */
} wd_moe_shape;

/* CUDA's tiled schedule keeps the columns of its products in groups of eight, by expert (cuda/columns.cuh): so many
 * groups at most. Few routes: a group each; many: whole groups, and a last one for each expert. */
static inline int64_t wd_column_groups(const wd_moe_shape *s) {
  const int64_t routes = s->tokens * s->top_k, shared = routes / 8 + s->experts;
  return routes < shared ? routes : shared;
}

/* One projection of all experts, whatever its layout. Element k (an input) of row r (an output) of expert e lies
 * offset + r * row_stride + k * k_stride elements behind the expert's first, which is pointers[e], or where there are
 * no pointers data + e * expert_stride. Either k_stride is 1, or the weights are transposed and row_stride is 1, or 2
 * where gate and up alternate. */
typedef struct {
  const void *data;
  const uint64_t *pointers; /* [E] addresses, in the memory of the weights' device; NULL: data */
  int64_t expert_stride, offset, row_stride, k_stride;
} wd_matrix;

/* The biases of a projection: that of row r lies offset + r * row_stride elements behind the expert's first, as above.
 * No biases: data and pointers are NULL. */
typedef struct {
  const void *data;
  const uint64_t *pointers;
  int64_t expert_stride, offset, row_stride;
  wd_dtype dtype;
} wd_bias;

static inline int wd_bias_given(const wd_bias *bias) {
  return bias->data != NULL || bias->pointers != NULL;
}

/* How a gate and an up become a value of the intermediate:
 *
 *   a     = at_most(activation(at_most(gate, limit_before)), limit_after)
 *   value = a * (clamp(up, -up_limit, up_limit) + up_offset), or a where there is no up
 *
 * at_most and clamp pass a NaN on. A limit that is not given is infinity, an offset that is not given -0, which alone
 * leaves every number as it is, the sign of a zero included. */
typedef struct {
  int32_t activation; /* wd_activation */
  int32_t has_up;
  float alpha; /* of silu: g / (1 + exp(-alpha g)) */
  float limit_before, limit_after, up_limit, up_offset;
} wd_gating;

typedef struct {
  wd_moe_shape shape;
  const void *hidden_states; /* [T, H] */
  const void *topk_ids;      /* [T, K] */
  void *intermediate;        /* [T, K, P, I] */
  void *scratch;             /* the scratch bytes of this kernel family for this shape, contents undefined */
  wd_matrix gate, up;        /* I rows of H each; up only where gating.has_up */
  wd_bias gate_bias, up_bias;
  wd_gating gating;
  const void *topk_weights; /* [T, K]: multiply the sums of gate and up before the biases; NULL: they do not */
  wd_dtype topk_weights_dtype;
} wd_gate_up_args;

typedef struct {
  wd_moe_shape shape;
  wd_dtype topk_weights_dtype;
  const void *intermediate; /* [T, K, P, I] */
  const void *topk_ids;     /* [T, K] */
  const void *topk_weights; /* [T, K]; NULL: each is 1, because gate_up had them */
  void *output;             /* [T, H] */
  void *scratch;  /* as above; behind gate_up of the same call the scratch that it had, else with room behind it for an
                   * intermediate, each row padded to a multiple of 32 values */
  wd_matrix down; /* H rows of I */
  wd_bias down_bias;
} wd_down_args;

#endif /* WD_ARGS_H */
