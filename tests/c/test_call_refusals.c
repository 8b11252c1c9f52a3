/* test_call_refusals.c - structs, options, kernels and workspaces that a call must refuse: exact sentences, nothing
 * written. */
#include "call.h"
#include "harness.h"
#include <stdio.h>
#include <string.h>

static void experts_struct(call *c, operation of) {
  const wd_moe_experts sound = c->experts;
  const size_t wrong[] = {0, 1, sizeof sound - 1, sizeof sound + 1, SIZE_MAX};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    c->experts.struct_size = wrong[i];
    call_refused(c, of, WD_INVALID_ARGUMENT,
                 "experts: struct_size was %zu, expected %zu, as in the warpdecode.h of version %s", wrong[i],
                 sizeof sound, wd_version());
  }
  c->experts = sound;
  static const int32_t activations[] = {-1, 5, INT32_MIN, INT32_MAX};
  for (size_t i = 0; i < sizeof activations / sizeof *activations; i++) {
    c->experts.activation = activations[i];
    call_refused(c, of, WD_INVALID_ARGUMENT,
                 "experts: activation was %d, expected 0 (silu), 1 (gelu_tanh), 2 (gelu), 3 (relu) or 4 (relu2)",
                 activations[i]);
  }
  c->experts = sound;
}

/* NULL for what `call` always has. */
static void null_experts(call *c) {
  const DLTensor *const *given = c->given;
  size_t bytes = 4711;
  static const char sentence[] = "experts: was NULL, expected a wd_moe_experts";
  memory_poison(&c->tensors[OUTPUT].memory);
  memory_poison(&c->tensors[INTERMEDIATE].memory);
  check_error(wd_moe_forward(NULL, given[HIDDEN_STATES], given[TOPK_IDS], given[TOPK_WEIGHTS], given[OUTPUT],
                             c->given_workspace, c->given_workspace_size, NULL, NULL),
              WD_INVALID_ARGUMENT, "%s", sentence);
  check_error(wd_moe_gate_up_3d_batched(NULL, given[HIDDEN_STATES], given[TOPK_IDS], given[INTERMEDIATE],
                                        c->given_workspace, c->given_workspace_size, NULL, NULL),
              WD_INVALID_ARGUMENT, "%s", sentence);
  check_error(wd_moe_down_3d_batched(NULL, given[INTERMEDIATE], given[TOPK_IDS], given[TOPK_WEIGHTS], given[OUTPUT],
                                     c->given_workspace, c->given_workspace_size, NULL, NULL),
              WD_INVALID_ARGUMENT, "%s", sentence);
  check_error(wd_moe_workspace_size(NULL, 1, 1, &bytes), WD_INVALID_ARGUMENT, "%s", sentence);
  CHECK(bytes == 4711 && memory_is_poisoned(&c->tensors[OUTPUT].memory) &&
            memory_is_poisoned(&c->tensors[INTERMEDIATE].memory),
        "a call without experts wrote");
  CHECK(wd_moe_forward(&c->experts, given[HIDDEN_STATES], given[TOPK_IDS], given[TOPK_WEIGHTS], given[OUTPUT],
                       c->given_workspace, c->given_workspace_size, NULL, NULL) == WD_OK,
        "options NULL: %s", wd_last_error());
}

static void options_struct(call *c, operation of) {
  const wd_options sound = c->options;
  const size_t wrong[] = {0, sizeof sound - 1, sizeof sound + 1, sizeof sound + 8, SIZE_MAX};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    c->options.struct_size = wrong[i];
    call_refused(c, of, WD_INVALID_ARGUMENT,
                 "options: struct_size was %zu, expected %zu, as in the warpdecode.h of version %s", wrong[i],
                 sizeof sound, wd_version());
  }
  c->options = sound;
}

/* Names that no row has, rows of another device, rows that this machine cannot run. */
static void kernels(call *c, operation of) {
  static const char *const unknown[] = {"warp9", "", "cpu", "CPU_GENERIC", "cpu_generic "};
  for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
    c->options.kernel = unknown[i];
    call_refused(c, of, WD_INVALID_ARGUMENT,
                 "options: kernel was \"%s\", expected a name that wd_get_kernel_info lists", unknown[i]);
  }
  for (int32_t i = 0; i < wd_kernel_count(); i++) {
    wd_kernel_info row = {.struct_size = sizeof row};
    CHECK(wd_get_kernel_info(i, &row) == WD_OK, "row %d: %s", i, wd_last_error());
    c->options.kernel = row.name;
    if (row.device_type == kDLCUDA)
      call_refused(c, of, WD_INVALID_ARGUMENT,
                   "options: kernel was \"%s\", which runs on CUDA, but the tensors are on the CPU", row.name);
    else if (!row.usable)
      call_refused(c, of, WD_UNSUPPORTED, "options: kernel was \"%s\", whose instructions this processor does not have",
                   row.name);
    else
      call_succeeds(c, of);
  }
  c->options.kernel = NULL;
}

static void workspaces(call *c, operation of) {
  unsigned char *const data = c->workspace.data;
  const size_t needed = c->given_workspace_size;
  const size_t small[] = {0, 1, needed - 1};
  for (size_t i = 0; i < sizeof small / sizeof *small; i++) {
    c->given_workspace_size = small[i];
    call_refused(c, of, WD_INVALID_ARGUMENT, "workspace: had %zu bytes, expected at least %zu (wd_moe_workspace_size)",
                 small[i], needed);
  }
  c->given_workspace_size = needed;
  c->given_workspace = NULL;
  call_refused(c, of, WD_INVALID_ARGUMENT, "workspace: was NULL, expected %zu bytes", needed);
  static const size_t past[] = {1, 2, 4, 8, 15};
  for (size_t i = 0; i < sizeof past / sizeof *past; i++) {
    c->given_workspace = data + past[i];
    call_refused(c, of, WD_INVALID_ARGUMENT,
                 "workspace: was %zu bytes past a multiple of 16, expected an address aligned to 16 bytes",
                 (size_t)((uintptr_t)(data + past[i]) % 16));
  }
  c->given_workspace = data;
}

/* Without tokens nothing is needed, and an address that would not do is not looked at. */
static void no_workspace(void) {
  sizes s = small_sizes(BFLOAT16);
  s.tokens = 0;
  call c;
  call_make(&c, s, 1102);
  for (int i = 0; i < OPERATIONS; i++)
    for (size_t address = 0; address < 3; address++) {
      c.given_workspace = (unsigned char *)c.tensors[GATE_UP_PROJ].memory.data + address;
      c.given_workspace_size = 0;
      call_succeeds(&c, (operation)i);
    }
  call_free(&c);
}

/* 16-byte alignment is enough, wherever in a cache line it falls, and larger workspaces are welcome. */
static void workspace_alignments(call *c, operation of) {
  const size_t needed = c->given_workspace_size;
  memory roomy = memory_take(needed + 64, BEGINS_AT_GUARD);
  for (size_t past = 0; past <= 64; past += 16) {
    memory_poison(&roomy);
    c->given_workspace = roomy.data + past;
    c->given_workspace_size = needed;
    call_succeeds(c, of);
    int untouched = 1;
    for (size_t i = 0; i < roomy.bytes; i++)
      untouched &= (i >= past && i < past + needed) || roomy.data[i] == 0xFF;
    CHECK(untouched, "%s wrote outside of a workspace %zu bytes past a page", operation_name(of), past);
  }
  c->given_workspace = roomy.data;
  c->given_workspace_size = roomy.bytes;
  call_succeeds(c, of);
  c->given_workspace = c->workspace.data;
  c->given_workspace_size = needed;
  memory_free(&roomy);
}

/* The arguments that wd_moe_workspace_size has of its own; it checks the experts as the operations do. */
static void workspace_size(call *c) {
  size_t bytes = 4711;
  static const int64_t negative[] = {-1, INT64_MIN}, slots[] = {0, -1, 1025, INT64_MAX, INT64_MIN, (1ll << 32) + 1};
  check_error(wd_moe_workspace_size(&c->experts, 1, 1, NULL), WD_INVALID_ARGUMENT,
              "bytes: was NULL, expected a place for the size");
  for (size_t i = 0; i < sizeof negative / sizeof *negative; i++)
    check_error(wd_moe_workspace_size(&c->experts, negative[i], 1, &bytes), WD_INVALID_ARGUMENT,
                "num_tokens: was %lld, expected 0 or more", (long long)negative[i]);
  for (size_t i = 0; i < sizeof slots / sizeof *slots; i++)
    check_error(wd_moe_workspace_size(&c->experts, 1, slots[i], &bytes), WD_INVALID_ARGUMENT,
                "topk_ids: K, the experts per token, was %lld, expected 1 to 1024", (long long)slots[i]);
  wd_moe_experts unsound = c->experts;
  unsound.down_proj = NULL;
  check_error(wd_moe_workspace_size(&unsound, 1, 1, &bytes), WD_INVALID_ARGUMENT,
              "down_proj: was NULL, expected a tensor [E, H, I]");
  unsound = c->experts;
  unsound.activation = 7;
  check_error(wd_moe_workspace_size(&unsound, 1, 1, &bytes), WD_INVALID_ARGUMENT,
              "experts: activation was 7, expected 0 (silu), 1 (gelu_tanh), 2 (gelu), 3 (relu) or 4 (relu2)");
  CHECK(bytes == 4711, "a refused wd_moe_workspace_size wrote %zu", bytes);

  size_t last = 0;
  for (int64_t tokens = 0; tokens <= 64; tokens = tokens * 2 + 1) {
    CHECK(wd_moe_workspace_size(&c->experts, tokens, 1024, &bytes) == WD_OK, "%d tokens: %s", (int)tokens,
          wd_last_error());
    CHECK(bytes >= last && (bytes == 0) == (tokens == 0), "%d tokens want %zu bytes, fewer ones %zu", (int)tokens,
          bytes, last);
    last = bytes;
  }
}

/* As many slots as there may be, and an expert for each route. */
static void most_slots(void) {
  sizes s = small_sizes(FLOAT16);
  s.tokens = 2;
  s.top_k = 1024;
  s.hidden = 8;
  s.intermediate = 8;
  call c;
  call_make(&c, s, 1101);
  call_succeeds(&c, FORWARD);
  call_runs_both_halves(&c);
  call_free(&c);
}

void test_call_refusals(void) {
  call c;
  call_make(&c, small_sizes(BFLOAT16), 1100);
  for (int i = 0; i < OPERATIONS; i++) {
    const operation of = (operation)i;
    harness_doing("refusals of %s", operation_name(of));
    experts_struct(&c, of);
    options_struct(&c, of);
    kernels(&c, of);
    workspaces(&c, of);
    workspace_alignments(&c, of);
    call_succeeds(&c, of);
  }
  null_experts(&c);
  workspace_size(&c);
  call_free(&c);
  no_workspace();
  most_slots();
}
