/* warpdecode.c - the API's three operations: check, choose, fill args, launch, and nothing between. */
#include "experts.h"
#include "schedule.h"

/* A pass serves at most so many routes, and so many values of intermediate and result (4 bytes each); larger calls run
 * pass after pass. That bounds the workspace. On CUDA passes are larger, or they would read the experts too often: of
 * 256, with top_k 8, a pass of 32768 routes serves 128 tokens each. */
enum { MAX_TOP_K = 1024 };
static const struct {
  int64_t routes, values;
} cpu_pass = {1 << 15, 1 << 28}, cuda_pass = {WD_CUDA_MOST_ROUTES, 1 << 30};

/* A checked call. Tensors an operation does not have are NULL. */
typedef struct {
  wd_experts experts;
  wd_moe_shape shape; /* tokens: of the whole call */
  int64_t pass;       /* tokens of a pass; the last may have fewer */
  DLDevice device;
  const DLTensor *hidden_states, *topk_ids, *topk_weights, *intermediate, *output;
  wd_dtype topk_weights_dtype;
  char *workspace;
  size_t intermediate_bytes; /* of one pass of wd_moe_forward, at the start of the workspace */
  void *stream;
  wd_threads *threads;
  wd_kernel kernel;
} call;

static int on_cuda(const call *c) {
  return c->device.device_type == kDLCUDA;
}

static int64_t tokens_per_pass(const call *c) {
  const int64_t routes = on_cuda(c) ? cuda_pass.routes : cpu_pass.routes;
  const int64_t values = on_cuda(c) ? cuda_pass.values : cpu_pass.values;
  const int64_t by_values = values / ((int64_t)c->shape.hidden + c->shape.intermediate);
  const int64_t tokens = (by_values < routes ? by_values : routes) / c->shape.top_k, most = tokens > 1 ? tokens : 1;
  return c->shape.tokens < most ? c->shape.tokens : most;
}

static size_t round_up(size_t bytes) {
  return (bytes + 127) / 128 * 128; /* so that what lies behind begins a line of L2, too */
}

/* Sets what depends on T and K. Returns the bytes of workspace that the call needs. */
static size_t plan_passes(call *c) {
  c->pass = tokens_per_pass(c);
  if (c->shape.tokens == 0) return 0;
  wd_moe_shape pass = c->shape;
  pass.tokens = c->pass;
  const int64_t routes = on_cuda(c) ? 8 * wd_column_groups(&pass) : pass.tokens * pass.top_k;
  c->intermediate_bytes = round_up((size_t)routes * (size_t)wd_intermediate_parts(pass.dtype) *
                                   (((size_t)pass.intermediate + 31) / 32 * 32) * wd_dtype_size(pass.dtype));
  return c->intermediate_bytes + (on_cuda(c) ? wd_cuda_scratch_bytes(&pass) : wd_cpu_scratch_bytes(&pass));
}

static wd_status check_experts(call *c, const wd_moe_experts *experts) {
  WD_TRY(wd_check_experts(experts, &c->experts));
  c->shape = c->experts.shape;
  c->device = c->experts.device;
  return WD_OK;
}

static wd_status check_top_k(int64_t top_k) {
  WD_CHECK(top_k >= 1 && top_k <= MAX_TOP_K, WD_INVALID_ARGUMENT,
           "topk_ids: K, the experts per token, was %lld, expected 1 to %d", (long long)top_k, MAX_TOP_K);
  return WD_OK;
}

/* The call's own tensors. Rank, shape, dtype, device and data of each; c->topk_ids comes first, it gives T and K. */
static wd_status check_tensors(call *c) {
  const int64_t any[2] = {WD_ANY, WD_ANY};
  wd_moe_shape *s = &c->shape;
  WD_TRY(wd_check_shape(c->topk_ids, "topk_ids", 2, any, "[T, K]"));
  WD_TRY(wd_check_ids(c->topk_ids, "topk_ids", &s->id_bytes));
  WD_TRY(wd_check_device(c->topk_ids, "topk_ids", c->device, "gate_up_proj"));
  WD_TRY(wd_check_data(c->topk_ids, "topk_ids", (size_t)s->id_bytes));
  s->tokens = c->topk_ids->shape[0];
  WD_TRY(check_top_k(c->topk_ids->shape[1]));
  s->top_k = (int32_t)c->topk_ids->shape[1];
  const int64_t by_token[2] = {s->tokens, s->hidden}, by_route[2] = {s->tokens, s->top_k};
  const int64_t parts[4] = {s->tokens, s->top_k, wd_intermediate_parts(s->dtype), s->intermediate};
  const struct {
    const DLTensor *tensor;
    const char *name, *letters;
    int32_t ndim;
    const int64_t *shape;
  } floats[] = {{c->hidden_states, "hidden_states", "[T, H]", 2, by_token},
                {c->intermediate, "intermediate", "[T, K, P, I]", 4, parts},
                {c->output, "output", "[T, H]", 2, by_token}};
  for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) {
    if (floats[i].tensor == NULL) continue;
    WD_TRY(wd_check_shape(floats[i].tensor, floats[i].name, floats[i].ndim, floats[i].shape, floats[i].letters));
    WD_TRY(wd_check_same_dtype(floats[i].tensor, floats[i].name, s->dtype, "gate_up_proj"));
    WD_TRY(wd_check_device(floats[i].tensor, floats[i].name, c->device, "gate_up_proj"));
    WD_TRY(wd_check_data(floats[i].tensor, floats[i].name, c->experts.alignment));
  }
  if (c->topk_weights != NULL) {
    WD_TRY(wd_check_shape(c->topk_weights, "topk_weights", 2, by_route, "[T, K]"));
    WD_TRY(wd_check_float(c->topk_weights, "topk_weights", 1, &c->topk_weights_dtype));
    WD_TRY(wd_check_device(c->topk_weights, "topk_weights", c->device, "gate_up_proj"));
    WD_TRY(wd_check_data(c->topk_weights, "topk_weights", wd_dtype_size(c->topk_weights_dtype)));
  }
  return WD_OK;
}

/* `written` must not overlap the call's other tensors. */
static wd_status check_overlaps(const call *c, const DLTensor *written, const char *name) {
  WD_TRY(wd_check_experts_disjoint(&c->experts, written, name));
  WD_TRY(wd_check_disjoint(written, name, c->topk_ids, "topk_ids"));
  if (c->hidden_states != NULL) WD_TRY(wd_check_disjoint(written, name, c->hidden_states, "hidden_states"));
  if (c->topk_weights != NULL) WD_TRY(wd_check_disjoint(written, name, c->topk_weights, "topk_weights"));
  if (c->intermediate != NULL && c->intermediate != written)
    WD_TRY(wd_check_disjoint(written, name, c->intermediate, "intermediate"));
  if (c->output != NULL && c->output != written) WD_TRY(wd_check_disjoint(written, name, c->output, "output"));
  return WD_OK;
}

static wd_status check_workspace(call *c, void *workspace, size_t workspace_size) {
  const size_t needed = plan_passes(c);
  WD_CHECK(workspace_size >= needed, WD_INVALID_ARGUMENT,
           "workspace: had %zu bytes, expected at least %zu (wd_moe_workspace_size)", workspace_size, needed);
  if (needed == 0) return WD_OK;
  WD_CHECK(workspace != NULL, WD_INVALID_ARGUMENT, "workspace: was NULL, expected %zu bytes", needed);
  WD_CHECK((uintptr_t)workspace % 16 == 0, WD_INVALID_ARGUMENT,
           "workspace: was %zu bytes past a multiple of 16, expected an address aligned to 16 bytes",
           (size_t)((uintptr_t)workspace % 16));
  int64_t bytes = (int64_t)needed;
  const DLTensor memory = {.data = workspace, .ndim = 1, .dtype = {kDLUInt, 8, 1}, .shape = &bytes};
  WD_TRY(check_overlaps(c, &memory, "workspace"));
  c->workspace = workspace;
  return WD_OK;
}

/* Row `first` of a [T, ...] tensor. */
static void *rows_from(const DLTensor *tensor, int64_t first) {
  size_t row = tensor->dtype.bits / 8u;
  for (int32_t i = 1; i < tensor->ndim; i++)
    row *= (size_t)tensor->shape[i];
  return (char *)wd_tensor_data(tensor) + (size_t)first * row;
}

/* One pass: tokens [first, first + count). intermediate: the workspace, or the caller's tensor. */
static wd_status run_pass(const call *c, int64_t first, int64_t count) {
  wd_moe_shape shape = c->shape;
  shape.tokens = count;
  void *intermediate = c->intermediate != NULL ? rows_from(c->intermediate, first) : c->workspace;
  void *scratch = c->intermediate != NULL ? c->workspace : c->workspace + c->intermediate_bytes;
  const wd_experts *const experts = &c->experts;
  const void *weights = c->topk_weights != NULL ? rows_from(c->topk_weights, first) : NULL;
  const int on_input = experts->given.weight_on_input;
  wd_cuda_handover handover = {0}, *const both = c->hidden_states != NULL && c->output != NULL ? &handover : NULL;
  if (c->hidden_states != NULL) {
    const wd_gate_up_args args = {.shape = shape,
                                  .hidden_states = rows_from(c->hidden_states, first),
                                  .topk_ids = rows_from(c->topk_ids, first),
                                  .intermediate = intermediate,
                                  .scratch = scratch,
                                  .gate = experts->gate,
                                  .up = experts->up,
                                  .gate_bias = experts->gate_bias,
                                  .up_bias = experts->up_bias,
                                  .gating = experts->gating,
                                  .topk_weights = on_input ? weights : NULL,
                                  .topk_weights_dtype = c->topk_weights_dtype};
    if (on_cuda(c))
      WD_TRY(wd_gate_up_cuda(&args, c->kernel.schedule, both, c->stream));
    else
      wd_gate_up_cpu(&args, c->kernel.isa, c->threads);
  }
  if (c->output != NULL) {
    const wd_down_args args = {.shape = shape,
                               .topk_weights_dtype = c->topk_weights_dtype,
                               .intermediate = intermediate,
                               .topk_ids = rows_from(c->topk_ids, first),
                               .topk_weights = on_input ? NULL : weights,
                               .output = rows_from(c->output, first),
                               .scratch = scratch,
                               .down = experts->down,
                               .down_bias = experts->down_bias};
    if (on_cuda(c))
      WD_TRY(wd_down_cuda(&args, c->kernel.schedule, both, c->stream));
    else
      wd_down_cpu(&args, c->kernel.isa, c->threads);
  }
  return WD_OK;
}

static wd_status run_passes(const call *c) {
  for (int64_t first = 0; first < c->shape.tokens; first += c->pass) {
    const int64_t left = c->shape.tokens - first;
    WD_TRY(run_pass(c, first, left < c->pass ? left : c->pass));
  }
  return WD_OK;
}

static wd_status run(const call *c) {
  if (c->shape.tokens == 0) return WD_OK;
  if (!on_cuda(c)) return run_passes(c);
  int32_t previous = 0;
  WD_TRY(wd_cuda_enter(c->device.device_id, &previous));
  const wd_status status = run_passes(c);
  const wd_status left = wd_cuda_leave(previous);
  return status != WD_OK ? status : left;
}

wd_status wd_moe_workspace_size(const wd_moe_experts *experts, int64_t num_tokens, int64_t top_k, size_t *bytes) {
  call c = {0};
  WD_CHECK(bytes != NULL, WD_INVALID_ARGUMENT, "bytes: was NULL, expected a place for the size");
  WD_TRY(check_experts(&c, experts));
  WD_CHECK(num_tokens >= 0, WD_INVALID_ARGUMENT, "num_tokens: was %lld, expected 0 or more", (long long)num_tokens);
  WD_TRY(check_top_k(top_k));
#ifndef WD_WITH_CUDA
  int32_t devices = 0;
  if (on_cuda(&c)) return wd_cuda_device_count(&devices); /* says how to get a build with CUDA */
#endif
  c.shape.tokens = num_tokens;
  c.shape.top_k = (int32_t)top_k;
  *bytes = plan_passes(&c);
  return WD_OK;
}

/* Check, choose, launch: what the three operations have in common. `written` is the call's result. */
static wd_status operate(call *c, const wd_moe_experts *experts, const DLTensor *written, const char *name,
                         void *workspace, size_t workspace_size, void *stream, const wd_options *options) {
  WD_TRY(check_experts(c, experts));
  WD_CHECK(!c->experts.given.weight_on_input || c->intermediate == NULL, WD_UNSUPPORTED,
           "experts: weight_on_input was 1, expected 0 where one kernel runs alone: use wd_moe_forward");
  WD_TRY(check_tensors(c));
  WD_TRY(check_overlaps(c, written, name));
  if (options != NULL) WD_TRY(wd_check_struct_size(options->struct_size, sizeof *options, "options"));
  WD_TRY(wd_choose_kernel(c->device, &c->shape, options != NULL ? options->kernel : NULL, &c->kernel));
  WD_TRY(check_workspace(c, workspace, workspace_size));
  c->threads = options != NULL ? options->threads : NULL;
  c->stream = stream;
  return run(c);
}

/* A missing tensor: check_tensors takes NULL for one that the operation does not have. */
#define WD_GIVEN(tensor, letters)                                                                                      \
  WD_CHECK((tensor) != NULL, WD_INVALID_ARGUMENT, #tensor ": was NULL, expected a tensor " letters)

wd_status wd_moe_forward(const wd_moe_experts *experts, const DLTensor *hidden_states, const DLTensor *topk_ids,
                         const DLTensor *topk_weights, const DLTensor *output, void *workspace, size_t workspace_size,
                         void *stream, const wd_options *options) {
  call c = {.hidden_states = hidden_states, .topk_ids = topk_ids, .topk_weights = topk_weights, .output = output};
  WD_GIVEN(hidden_states, "[T, H]");
  WD_GIVEN(topk_weights, "[T, K]");
  WD_GIVEN(output, "[T, H]");
  return operate(&c, experts, output, "output", workspace, workspace_size, stream, options);
}

wd_status wd_moe_gate_up_3d_batched(const wd_moe_experts *experts, const DLTensor *hidden_states,
                                    const DLTensor *topk_ids, const DLTensor *intermediate, void *workspace,
                                    size_t workspace_size, void *stream, const wd_options *options) {
  call c = {.hidden_states = hidden_states, .topk_ids = topk_ids, .intermediate = intermediate};
  WD_GIVEN(hidden_states, "[T, H]");
  WD_GIVEN(intermediate, "[T, K, P, I]");
  return operate(&c, experts, intermediate, "intermediate", workspace, workspace_size, stream, options);
}

wd_status wd_moe_down_3d_batched(const wd_moe_experts *experts, const DLTensor *intermediate, const DLTensor *topk_ids,
                                 const DLTensor *topk_weights, const DLTensor *output, void *workspace,
                                 size_t workspace_size, void *stream, const wd_options *options) {
  call c = {.topk_ids = topk_ids, .topk_weights = topk_weights, .intermediate = intermediate, .output = output};
  WD_GIVEN(intermediate, "[T, K, P, I]");
  WD_GIVEN(topk_weights, "[T, K]");
  WD_GIVEN(output, "[T, H]");
  return operate(&c, experts, output, "output", workspace, workspace_size, stream, options);
}
