/* call.c - calls of the library: made, run, refused. */
#include "call.h"
#include "harness.h"
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *operation_name(operation of) {
  static const char *const names[] = {"forward", "gate_up", "down"};
  return names[of];
}

const char *tensor_name(int which) {
  static const char *const names[] = {"gate_up_proj", "down_proj",    "hidden_states", "topk_ids",
                                      "topk_weights", "intermediate", "output"};
  return names[which];
}

const char *tensor_letters(int which) {
  static const char *const letters[] = {"[E, 2I, H]", "[E, H, I]",    "[T, H]", "[T, K]",
                                        "[T, K]",     "[T, K, P, I]", "[T, H]"};
  return letters[which];
}

int operation_uses(operation of, int which) {
  switch (which) {
  case HIDDEN_STATES:
    return of != DOWN;
  case INTERMEDIATE:
    return of != FORWARD;
  case TOPK_WEIGHTS:
  case OUTPUT:
    return of != GATE_UP;
  default:
    return 1;
  }
}

sizes small_sizes(kind of) {
  return (sizes){.tokens = 4,
                 .top_k = 2,
                 .experts = 3,
                 .hidden = 24,
                 .intermediate = 16,
                 .of = of,
                 .ids = INT64,
                 .weights = FLOAT32,
                 .activation = WD_ACTIVATION_SILU,
                 .where = ENDS_AT_GUARD};
}

void call_make(call *made, sizes of, uint64_t seed) {
  memset(made, 0, sizeof *made);
  made->sizes = of;
  const struct {
    kind of;
    int32_t ndim;
    int64_t shape[4];
  } tensors[TENSORS] = {
      [GATE_UP_PROJ] = {of.of, 3, {of.experts, 2 * of.intermediate, of.hidden}},
      [DOWN_PROJ] = {of.of, 3, {of.experts, of.hidden, of.intermediate}},
      [HIDDEN_STATES] = {of.of, 2, {of.tokens, of.hidden}},
      [TOPK_IDS] = {of.ids, 2, {of.tokens, of.top_k}},
      [TOPK_WEIGHTS] = {of.weights, 2, {of.tokens, of.top_k}},
      [INTERMEDIATE] = {of.of, 4, {of.tokens, of.top_k, of.of == FLOAT32 ? 1 : 2, of.intermediate}},
      [OUTPUT] = {of.of, 2, {of.tokens, of.hidden}},
  };
  for (int i = 0; i < TENSORS; i++) {
    tensor_make(&made->tensors[i], tensors[i].of, tensors[i].ndim, tensors[i].shape, of.where);
    made->given[i] = &made->tensors[i].dl;
  }
  /* Variance 1 for the states, and for gate and up, so that the activation bends. */
  const double unit = sqrt(3.0);
  tensor_fill(&made->tensors[GATE_UP_PROJ], 8 * seed + 1, unit / sqrt((double)of.hidden));
  tensor_fill(&made->tensors[DOWN_PROJ], 8 * seed + 2, unit / sqrt((double)of.intermediate));
  tensor_fill(&made->tensors[HIDDEN_STATES], 8 * seed + 3, unit);
  tensor_fill(&made->tensors[TOPK_WEIGHTS], 8 * seed + 4, 1.0);
  for (int64_t i = 0; i < of.tokens * of.top_k; i++)
    tensor_set_id(&made->tensors[TOPK_IDS], i, (int64_t)random_below(8 * seed + 5, (uint64_t)i, (uint64_t)of.experts));
  made->experts = (wd_moe_experts){.struct_size = sizeof made->experts,
                                   .gate_up_proj = made->given[GATE_UP_PROJ],
                                   .down_proj = made->given[DOWN_PROJ],
                                   .activation = of.activation};
  made->options = (wd_options){.struct_size = sizeof made->options};
  size_t bytes = 0;
  CHECK(wd_moe_workspace_size(&made->experts, of.tokens, of.top_k, &bytes) == WD_OK, "workspace size: %s",
        wd_last_error());
  made->workspace = memory_take((bytes + 15) / 16 * 16, of.where);
  made->given_workspace = made->workspace.data;
  made->given_workspace_size = bytes;
}

void call_free(call *made) {
  for (int i = 0; i < TENSORS; i++)
    tensor_free(&made->tensors[i]);
  memory_free(&made->workspace);
}

wd_status call_rerun(const call *made, operation of) {
  const DLTensor *const *given = made->given;
  wd_moe_experts experts = made->experts;
  experts.gate_up_proj = given[GATE_UP_PROJ];
  experts.down_proj = given[DOWN_PROJ];
  void *workspace = made->given_workspace;
  const size_t size = made->given_workspace_size;
  switch (of) {
  case FORWARD:
    return wd_moe_forward(&experts, given[HIDDEN_STATES], given[TOPK_IDS], given[TOPK_WEIGHTS], given[OUTPUT],
                          workspace, size, NULL, &made->options);
  case GATE_UP:
    return wd_moe_gate_up_3d_batched(&experts, given[HIDDEN_STATES], given[TOPK_IDS], given[INTERMEDIATE], workspace,
                                     size, NULL, &made->options);
  default:
    return wd_moe_down_3d_batched(&experts, given[INTERMEDIATE], given[TOPK_IDS], given[TOPK_WEIGHTS], given[OUTPUT],
                                  workspace, size, NULL, &made->options);
  }
}

wd_status call_run(call *made, operation of) {
  memory_poison(&made->workspace);
  memory_poison(&made->tensors[of == GATE_UP ? INTERMEDIATE : OUTPUT].memory);
  return call_rerun(made, of);
}

void call_succeeds(call *made, operation of) {
  const wd_status status = call_run(made, of);
  CHECK(status == WD_OK, "%s gave status %d: %s", operation_name(of), (int)status, wd_last_error());
}

void call_runs_both_halves(call *made) {
  call_succeeds(made, GATE_UP);
  call_succeeds(made, DOWN);
}

static void check_error_text(wd_status found, wd_status expected, const char *format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof text, format, arguments);
  CHECK(found == expected && strcmp(wd_last_error(), text) == 0,
        "expected status %d: %s\n         found status    %d: %s", (int)expected, text, (int)found, wd_last_error());
}

void check_error(wd_status found, wd_status expected, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  check_error_text(found, expected, format, arguments);
  va_end(arguments);
}

void call_refused(call *made, operation of, wd_status status, const char *format, ...) {
  memory_poison(&made->tensors[INTERMEDIATE].memory);
  memory_poison(&made->tensors[OUTPUT].memory);
  const wd_status found = call_run(made, of);
  va_list arguments;
  va_start(arguments, format);
  check_error_text(found, status, format, arguments);
  va_end(arguments);
  CHECK(memory_is_poisoned(&made->workspace) && memory_is_poisoned(&made->tensors[INTERMEDIATE].memory) &&
            memory_is_poisoned(&made->tensors[OUTPUT].memory),
        "%s wrote although it gave status %d: %s", operation_name(of), (int)found, wd_last_error());
}

void check_same_bits(const tensor *found, const void *expected, const char *format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  CHECK(memcmp(found->memory.data, expected, found->memory.bytes) == 0, "other bits: %s", text);
}

void numbers_text(char text[96], const int64_t *values, int32_t count) {
  size_t used = 0;
  for (int32_t i = 0; i < count; i++)
    used += (size_t)snprintf(text + used, 96 - used, "%s%lld", i ? ", " : "[", (long long)values[i]);
  snprintf(text + used, 96 - used, "]");
}

void *bits_of(const tensor *of) {
  void *copy = malloc(of->memory.bytes + 1); /* one byte more: none would be NULL */
  if (copy == NULL) exit(2);
  memcpy(copy, of->memory.data, of->memory.bytes);
  return copy;
}

int usable_kernels(const char **names, int limit) {
  int count = 0;
  for (int32_t i = 0; i < wd_kernel_count(); i++) {
    wd_kernel_info row = {.struct_size = sizeof row};
    if (wd_get_kernel_info(i, &row) != WD_OK || row.device_type != kDLCPU || !row.usable) continue;
    if (count < limit) names[count++] = row.name;
  }
  return count;
}
