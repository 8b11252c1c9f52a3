/* test_experts_refusals.c - descriptions of a layer that must be refused: exact sentences, nothing written. */
#include "harness.h"
#include "layouts.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

static void refused_numbers(call *c) {
  const wd_moe_experts sound = c->experts;
  static const int32_t wrong[] = {-1, 2, INT32_MAX};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    static const struct {
      const char *name;
      size_t offset;
    } flags[] = {{"is_interleaved", offsetof(wd_moe_experts, is_interleaved)},
                 {"no_gate", offsetof(wd_moe_experts, no_gate)},
                 {"weight_on_input", offsetof(wd_moe_experts, weight_on_input)},
                 {"clamp_after_activation", offsetof(wd_moe_experts, clamp_after_activation)}};
    for (size_t j = 0; j < sizeof flags / sizeof *flags; j++) {
      memcpy((char *)&c->experts + flags[j].offset, &wrong[i], sizeof wrong[i]);
      call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "experts: %s was %d, expected 0 or 1", flags[j].name, wrong[i]);
      c->experts = sound;
    }
    c->experts.is_transposed = wrong[i] == 2 ? 3 : wrong[i];
    call_refused(c, FORWARD, WD_INVALID_ARGUMENT,
                 "experts: is_transposed was %d, expected 0 (none), 1 (all) or 2 (down_proj alone)",
                 c->experts.is_transposed);
    c->experts = sound;
  }
  c->experts.limit = -2.0f;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "experts: limit was -2, expected 0 (none) or more");
  c->experts = sound;
  c->experts.alpha = INFINITY;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "experts: alpha was inf, expected 0 (none) or a finite number above");
  c->experts = sound;
  c->experts.up_offset = -INFINITY;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "experts: up_offset was -inf, expected a finite number");
  c->experts = sound;
  c->experts.weight_on_input = 1;
  for (int of = GATE_UP; of <= DOWN; of++)
    call_refused(c, (operation)of, WD_UNSUPPORTED,
                 "experts: weight_on_input was 1, expected 0 where one kernel runs alone: use wd_moe_forward");
  c->experts = sound;
}

/* A subnormal limit is one, and a negative one is refused, in a process that takes subnormal numbers for zero. */
static void subnormal_limits(call *c) {
#if defined(__x86_64__)
  const wd_moe_experts sound = c->experts;
  c->experts.limit = 1e-39f;
  call_succeeds(c, FORWARD);
  void *const expected = bits_of(&c->tensors[OUTPUT]);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040); /* flush to zero, denormals are zero */
  const wd_status status = call_run(c, FORWARD);
  c->experts.limit = -1e-39f;
  const wd_status negative = call_rerun(c, FORWARD);
  _mm_setcsr(before);
  CHECK(status == WD_OK && negative == WD_INVALID_ARGUMENT, "limits 1e-39 and -1e-39 gave status %d and %d",
        (int)status, (int)negative);
  check_same_bits(&c->tensors[OUTPUT], expected, "a subnormal limit where denormals are zero");
  free(expected);
  c->experts = sound;
#else
  (void)c;
  harness_skip("denormals-are-zero is set on x86-64 alone");
#endif
}

/* Properties that exclude each other, by tensor or by table. */
static void refused_pairs(call *c) {
  const wd_moe_experts sound = c->experts;
  const DLTensor *const any = &c->tensors[TOPK_IDS].dl;
  c->experts.no_gate = 1;
  c->experts.up_pointers = any;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT,
               "up_pointers: was given, expected NULL with no_gate, where gate_up_proj is the only projection");
  c->experts.up_proj = any;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT,
               "up_proj: was given, expected NULL with no_gate, where gate_up_proj is the only projection");
  c->experts = sound;
  c->experts.up_bias_pointers = any;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT,
               "up_bias_pointers: was given, expected NULL without up_proj, where gate_up_bias has all biases");
  c->experts.up_bias = any;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT,
               "up_bias: was given, expected NULL without up_proj, where gate_up_bias has all biases");
  c->experts = sound;
}

/* Tables: their own description, the one beside them, and what is written over them. */
static void refused_tables(call *c) {
  const wd_moe_experts sound = c->experts;
  part parts[PARTS];
  tensor bias, down_bias;
  const layout pointers = {"pointers", 0, 0, 0, 1};
  tensor_make(&bias, FLOAT32, 2, (int64_t[]){c->sizes.experts, 2 * c->sizes.intermediate}, c->sizes.where);
  tensor_make(&down_bias, FLOAT32, 2, (int64_t[]){c->sizes.experts, c->sizes.hidden}, c->sizes.where);
  tensor_fill(&bias, 1, 1.0);
  tensor_fill(&down_bias, 2, 1.0);
  parts_store(parts, c, &bias, &down_bias, pointers);
  parts_give(c, parts, pointers);
  call_succeeds(c, FORWARD);
  c->given[GATE_UP_PROJ] = NULL;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "gate_up_proj: was NULL, expected a tensor [2I, H]");
  c->given[GATE_UP_PROJ] = &parts[GATE_UP_PART].described;
  c->experts.down_bias = NULL;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "down_bias: was NULL, expected a tensor [H]");
  c->experts.down_bias = &parts[DOWN_BIAS_PART].described;
  DLTensor *const table = &parts[DOWN_PART].table.dl;
  const DLTensor table_sound = *table;
  table->dtype = (DLDataType){kDLInt, 32, 1};
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "down_pointers: dtype was int32, expected int64 or uint64");
  table->dtype = (DLDataType){kDLUInt, 64, 1};
  call_succeeds(c, FORWARD);
  *table = table_sound;
  table->data = (char *)table_sound.data - 4;
  call_refused(
      c, FORWARD, WD_INVALID_ARGUMENT,
      "down_pointers: data (byte_offset included) was 4 bytes past a multiple of 8, expected an address aligned "
      "to 8 bytes");
  *table = table_sound;
  table->shape = (int64_t[]){2};
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "down_pointers: shape was [2], expected [E] = [3]");
  *table = table_sound;
  table->device = (DLDevice){kDLCUDA, 0};
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "down_pointers: was on cuda:0, expected cpu as gate_up_proj");
  *table = table_sound;
  DLTensor over = c->tensors[OUTPUT].dl;
  c->given[OUTPUT] = &over;
  over.data = table->data;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "output: overlaps down_pointers in memory, expected memory of its own");
  c->experts.down_bias_pointers = NULL;
  c->experts.down_bias = &down_bias.dl;
  over.data = down_bias.memory.data;
  call_refused(c, FORWARD, WD_INVALID_ARGUMENT, "output: overlaps down_bias in memory, expected memory of its own");
  c->given[OUTPUT] = &c->tensors[OUTPUT].dl;
  call_succeeds(c, FORWARD); /* a tensor beside tables */
  c->experts = sound;
  c->given[GATE_UP_PROJ] = &c->tensors[GATE_UP_PROJ].dl;
  c->given[DOWN_PROJ] = &c->tensors[DOWN_PROJ].dl;
  parts_free(parts);
  tensor_free(&bias);
  tensor_free(&down_bias);
}

void test_experts_refusals(void) {
  call c;
  call_make(&c, small_sizes(BFLOAT16), 1702);
  refused_numbers(&c);
  subnormal_limits(&c);
  refused_pairs(&c);
  refused_tables(&c);
  call_succeeds(&c, FORWARD);
  call_free(&c);
}
