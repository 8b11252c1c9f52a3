/* experts.c - checks the description of a layer, then says where its rows lie.
 *
 * Six parts (weights and biases), each a tensor of all experts or a description of one expert's beside a table of
 * addresses; the rest is numbers. After the checks a layout is strides, and nothing else of it reaches a kernel. */
#include "experts.h"

#include "dtype.h"
#include <math.h>
#include <stdio.h>

enum { MAX_EXPERTS = 65535, MAX_SIZE = 1 << 24 };

typedef struct {
  const char *name;
  const DLTensor *tensor;
  const char *table_name;
  const DLTensor *table;
} part;

enum { GATE_UP, DOWN, UP, GATE_UP_BIAS, UP_BIAS, DOWN_BIAS, PARTS };

static void parts_of(const wd_moe_experts *given, part parts[static PARTS]) {
  parts[GATE_UP] = (part){"gate_up_proj", given->gate_up_proj, "gate_up_pointers", given->gate_up_pointers};
  parts[DOWN] = (part){"down_proj", given->down_proj, "down_pointers", given->down_pointers};
  parts[UP] = (part){"up_proj", given->up_proj, "up_pointers", given->up_pointers};
  parts[GATE_UP_BIAS] =
      (part){"gate_up_bias", given->gate_up_bias, "gate_up_bias_pointers", given->gate_up_bias_pointers};
  parts[UP_BIAS] = (part){"up_bias", given->up_bias, "up_bias_pointers", given->up_bias_pointers};
  parts[DOWN_BIAS] = (part){"down_bias", given->down_bias, "down_bias_pointers", given->down_bias_pointers};
}

/* A part has `axes` axes behind E, of these lengths and letters; a table takes E away. */
static wd_status check_shape(part p, int64_t experts, int32_t axes, const int64_t *lengths, const char *letters) {
  const int64_t shape[3] = {experts, lengths[0], axes > 1 ? lengths[1] : 0};
  char all[32];
  snprintf(all, sizeof all, p.table != NULL ? "[%s]" : "[E, %s]", letters);
  return wd_check_shape(p.tensor, p.name, p.table != NULL ? axes : axes + 1, p.table != NULL ? shape + 1 : shape, all);
}

/* The table of a part, if it has one; `experts` may be WD_ANY. */
static wd_status check_table(part p, int64_t experts) {
  if (p.table == NULL) return WD_OK;
  WD_TRY(wd_check_shape(p.table, p.table_name, 1, &experts, "[E]"));
  WD_TRY(wd_check_addresses(p.table, p.table_name));
  return WD_OK;
}

/* Device and data of a part whose shape and dtype are right. */
static wd_status check_memory(const wd_experts *x, part p, size_t alignment) {
  WD_TRY(wd_check_device(p.tensor, p.name, x->device, "gate_up_proj"));
  if (p.table == NULL) return wd_check_data(p.tensor, p.name, alignment);
  WD_TRY(wd_check_device(p.table, p.table_name, x->device, "gate_up_proj"));
  return wd_check_data(p.table, p.table_name, sizeof(uint64_t));
}

static wd_status check_flag(int32_t value, const char *name) {
  WD_CHECK(value == 0 || value == 1, WD_INVALID_ARGUMENT, "experts: %s was %d, expected 0 or 1", name, value);
  return WD_OK;
}

/* By its bits: where a process has set denormals-are-zero, a comparison takes subnormal numbers for zero as well. */
static int is_zero(float value) {
  return wd_float_bits(value) << 1 == 0;
}

static int is_zero_or_more(float value) {
  return !isnan(value) && (!signbit(value) || is_zero(value));
}

/* Flags, and properties that exclude each other. */
static wd_status check_properties(const wd_moe_experts *g) {
  WD_CHECK(g->activation >= WD_ACTIVATION_SILU && g->activation <= WD_ACTIVATION_RELU2, WD_INVALID_ARGUMENT,
           "experts: activation was %d, expected 0 (silu), 1 (gelu_tanh), 2 (gelu), 3 (relu) or 4 (relu2)",
           g->activation);
  WD_CHECK(g->is_transposed >= WD_TRANSPOSED_NONE && g->is_transposed <= WD_TRANSPOSED_DOWN, WD_INVALID_ARGUMENT,
           "experts: is_transposed was %d, expected 0 (none), 1 (all) or 2 (down_proj alone)", g->is_transposed);
  WD_TRY(check_flag(g->is_interleaved, "is_interleaved"));
  WD_TRY(check_flag(g->no_gate, "no_gate"));
  WD_TRY(check_flag(g->weight_on_input, "weight_on_input"));
  WD_TRY(check_flag(g->clamp_after_activation, "clamp_after_activation"));
  WD_CHECK(!g->no_gate || (g->up_proj == NULL && g->up_pointers == NULL), WD_INVALID_ARGUMENT,
           "%s: was given, expected NULL with no_gate, where gate_up_proj is the only projection",
           g->up_proj != NULL ? "up_proj" : "up_pointers");
  WD_CHECK(!g->is_interleaved || (!g->no_gate && g->up_proj == NULL), WD_INVALID_ARGUMENT,
           "experts: is_interleaved was 1, expected 0 with %s, where gate_up_proj is one projection",
           g->no_gate ? "no_gate" : "up_proj");
  WD_CHECK((g->up_bias == NULL && g->up_bias_pointers == NULL) || g->up_proj != NULL, WD_INVALID_ARGUMENT,
           "%s: was given, expected NULL without up_proj, where gate_up_bias has all biases",
           g->up_bias != NULL ? "up_bias" : "up_bias_pointers");
  WD_CHECK(is_zero_or_more(g->limit), WD_INVALID_ARGUMENT, "experts: limit was %g, expected 0 (none) or more",
           (double)g->limit);
  WD_CHECK(is_zero(g->limit) || !g->no_gate, WD_INVALID_ARGUMENT, "experts: limit was %g, expected 0 with no_gate",
           (double)g->limit);
  WD_CHECK(isfinite(g->alpha) && is_zero_or_more(g->alpha), WD_INVALID_ARGUMENT,
           "experts: alpha was %g, expected 0 (none) or a finite number above", (double)g->alpha);
  WD_CHECK(is_zero(g->alpha) || g->activation == WD_ACTIVATION_SILU, WD_INVALID_ARGUMENT,
           "experts: alpha was %g, expected 0 with activation %d: silu alone has it", (double)g->alpha, g->activation);
  WD_CHECK(isfinite(g->up_offset), WD_INVALID_ARGUMENT, "experts: up_offset was %g, expected a finite number",
           (double)g->up_offset);
  WD_CHECK(is_zero(g->up_offset) || !g->no_gate, WD_INVALID_ARGUMENT,
           "experts: up_offset was %g, expected 0 with no_gate", (double)g->up_offset);
  return WD_OK;
}

/* gate_up_proj, which decides E, H, I, dtype and device. */
static wd_status check_gate_up(wd_experts *x, part p) {
  const int both = x->both, transposed = x->transposed;
  const int64_t any[2] = {WD_ANY, WD_ANY};
  WD_TRY(check_table(p, WD_ANY));
  WD_TRY(check_shape(p, WD_ANY, 2, any, transposed ? both ? "H, 2I" : "H, I" : both ? "2I, H" : "I, H"));
  WD_CHECK(p.tensor->device.device_type == kDLCPU || p.tensor->device.device_type == kDLCUDAHost ||
               p.tensor->device.device_type == kDLCUDA,
           WD_UNSUPPORTED, "gate_up_proj: DLPack device type was %d, expected %d (CPU) or %d (CUDA)",
           (int)p.tensor->device.device_type, (int)kDLCPU, (int)kDLCUDA);
  x->device = p.tensor->device.device_type == kDLCUDAHost ? (DLDevice){kDLCPU, 0} : p.tensor->device;
  const int64_t experts = p.table != NULL ? p.table->shape[0] : p.tensor->shape[0];
  const int64_t *const matrix = p.tensor->shape + (p.table == NULL);
  const int64_t hidden = matrix[transposed ? 0 : 1], rows = matrix[transposed ? 1 : 0];
  WD_CHECK(experts >= 1 && experts <= MAX_EXPERTS, WD_INVALID_ARGUMENT,
           "%s: number of experts was %lld, expected 1 to %d", p.table != NULL ? p.table_name : p.name,
           (long long)experts, MAX_EXPERTS);
  WD_CHECK(hidden >= 8 && hidden % 8 == 0 && hidden <= MAX_SIZE, WD_UNSUPPORTED,
           "gate_up_proj: hidden size H was %lld, expected a multiple of 8 from 8 to %d", (long long)hidden, MAX_SIZE);
  const int64_t step = both ? 16 : 8;
  WD_CHECK(rows >= step && rows % step == 0 && rows / (both ? 2 : 1) <= MAX_SIZE, WD_UNSUPPORTED,
           "gate_up_proj: %sI was %lld %s, expected %sa multiple of 8 from 8 to %d", both ? "2" : "", (long long)rows,
           transposed ? "columns" : "rows", both ? "twice " : "", MAX_SIZE);
  const int on_cpu = x->device.device_type == kDLCPU;
  WD_TRY(wd_check_float(p.tensor, p.name, on_cpu, &x->shape.dtype));
  /* Vector loads on CUDA are 16 bytes and need their alignment; on the CPU an element's will do, because checkpoints
   * mapped into memory lie anywhere. */
  x->alignment = on_cpu ? wd_dtype_size(x->shape.dtype) : 16;
  x->shape.experts = (int32_t)experts;
  x->shape.hidden = (int32_t)hidden;
  x->shape.intermediate = (int32_t)(rows / (both ? 2 : 1));
  return check_memory(x, p, x->alignment);
}

/* down_proj or up_proj: `rows` outputs of `n` inputs, their letters as documented. */
static wd_status check_weights(const wd_experts *x, part p, const int64_t lengths[static 2], const char *letters) {
  WD_TRY(check_table(p, x->shape.experts));
  WD_TRY(check_shape(p, x->shape.experts, 2, lengths, letters));
  WD_TRY(wd_check_same_dtype(p.tensor, p.name, x->shape.dtype, "gate_up_proj"));
  return check_memory(x, p, x->alignment);
}

static wd_status check_bias(const wd_experts *x, part p, int64_t length, const char *letters, wd_dtype *dtype) {
  if (p.tensor == NULL && p.table == NULL) return WD_OK;
  WD_TRY(check_table(p, x->shape.experts));
  WD_TRY(check_shape(p, x->shape.experts, 1, &length, letters));
  WD_TRY(wd_check_float_or(p.tensor, p.name, x->shape.dtype, dtype));
  return check_memory(x, p, wd_dtype_size(*dtype));
}

static wd_matrix matrix_of(part p, int64_t rows, int64_t n, int transposed) {
  return (wd_matrix){.data = p.table == NULL ? wd_tensor_data(p.tensor) : NULL,
                     .pointers = p.table == NULL ? NULL : wd_tensor_data(p.table),
                     .expert_stride = rows * n,
                     .row_stride = transposed ? 1 : n,
                     .k_stride = transposed ? rows : 1};
}

static wd_bias bias_of(part p, int64_t rows, wd_dtype dtype) {
  if (p.tensor == NULL) return (wd_bias){0};
  return (wd_bias){.data = p.table == NULL ? wd_tensor_data(p.tensor) : NULL,
                   .pointers = p.table == NULL ? NULL : wd_tensor_data(p.table),
                   .expert_stride = rows,
                   .row_stride = 1,
                   .dtype = dtype};
}

/* A layout becomes strides. */
static void lay_out(wd_experts *x, const part parts[static PARTS], const wd_dtype bias_dtypes[static PARTS]) {
  const wd_moe_experts *const g = &x->given;
  const int64_t I = x->shape.intermediate, H = x->shape.hidden;
  const int64_t rows = x->both ? 2 * I : I;
  x->gate = matrix_of(parts[GATE_UP], rows, H, x->transposed);
  x->gate_bias = bias_of(parts[GATE_UP_BIAS], rows, bias_dtypes[GATE_UP_BIAS]);
  x->down = matrix_of(parts[DOWN], H, I, g->is_transposed != WD_TRANSPOSED_NONE);
  x->down_bias = bias_of(parts[DOWN_BIAS], H, bias_dtypes[DOWN_BIAS]);
  if (g->up_proj != NULL) {
    x->up = matrix_of(parts[UP], I, H, x->transposed);
    x->up_bias = bias_of(parts[UP_BIAS], I, bias_dtypes[UP_BIAS]);
  } else if (x->both) {
    const int64_t up_row = g->is_interleaved ? 1 : I;
    x->up = x->gate;
    x->up_bias = x->gate_bias;
    x->up.offset = up_row * x->gate.row_stride;
    x->up_bias.offset = up_row;
    if (g->is_interleaved) {
      x->gate.row_stride *= 2;
      x->gate_bias.row_stride *= 2;
      x->up.row_stride = x->gate.row_stride;
      x->up_bias.row_stride = x->gate_bias.row_stride;
    }
  }
}

static wd_gating gating_of(const wd_moe_experts *g) {
  const float limit = is_zero(g->limit) ? INFINITY : g->limit;
  return (wd_gating){.activation = g->activation,
                     .has_up = !g->no_gate,
                     .alpha = is_zero(g->alpha) ? 1.0f : g->alpha,
                     .limit_before = g->clamp_after_activation ? INFINITY : limit,
                     .limit_after = g->clamp_after_activation ? limit : INFINITY,
                     .up_limit = limit,
                     .up_offset = is_zero(g->up_offset) ? -0.0f : g->up_offset};
}

wd_status wd_check_experts(const wd_moe_experts *given, wd_experts *x) {
  WD_CHECK(given != NULL, WD_INVALID_ARGUMENT, "experts: was NULL, expected a wd_moe_experts");
  WD_TRY(wd_check_struct_size(given->struct_size, sizeof *given, "experts"));
  *x = (wd_experts){.given = *given,
                    .both = !given->no_gate && given->up_proj == NULL,
                    .transposed = given->is_transposed == WD_TRANSPOSED_ALL};
  const wd_moe_experts *const g = &x->given;
  part parts[PARTS];
  parts_of(g, parts);
  wd_dtype bias_dtypes[PARTS] = {WD_F32};
  WD_TRY(check_properties(g));
  WD_TRY(check_gate_up(x, parts[GATE_UP]));
  const int64_t I = x->shape.intermediate, H = x->shape.hidden;
  const int64_t hi[2] = {H, I}, ih[2] = {I, H};
  if (g->is_transposed)
    WD_TRY(check_weights(x, parts[DOWN], ih, "I, H"));
  else
    WD_TRY(check_weights(x, parts[DOWN], hi, "H, I"));
  if (g->up_proj != NULL || g->up_pointers != NULL)
    WD_TRY(check_weights(x, parts[UP], x->transposed ? hi : ih, x->transposed ? "H, I" : "I, H"));
  WD_TRY(check_bias(x, parts[GATE_UP_BIAS], x->both ? 2 * I : I, x->both ? "2I" : "I", &bias_dtypes[GATE_UP_BIAS]));
  WD_TRY(check_bias(x, parts[UP_BIAS], I, "I", &bias_dtypes[UP_BIAS]));
  WD_TRY(check_bias(x, parts[DOWN_BIAS], H, "H", &bias_dtypes[DOWN_BIAS]));
  lay_out(x, parts, bias_dtypes);
  x->shape.transposed = g->is_transposed != 0;
  x->shape.scattered = x->gate.pointers != NULL || x->up.pointers != NULL || x->down.pointers != NULL;
  x->gating = gating_of(g);
  return WD_OK;
}

wd_status wd_check_experts_disjoint(const wd_experts *experts, const DLTensor *written, const char *name) {
  part parts[PARTS];
  parts_of(&experts->given, parts);
  for (int i = 0; i < PARTS; i++) {
    if (parts[i].table != NULL)
      WD_TRY(wd_check_disjoint(written, name, parts[i].table, parts[i].table_name));
    else if (parts[i].tensor != NULL)
      WD_TRY(wd_check_disjoint(written, name, parts[i].tensor, parts[i].name));
  }
  return WD_OK;
}
