/* test_layouts.c - the same numbers in every layout, between guard pages: the bits of the standard one; and
 * descriptions that must be refused: exact sentences, nothing written. */
#include "call.h"
#include "harness.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MANY_KERNELS = 16, MANY_EXPERTS = 4 };

typedef struct {
  const char *name;
  int32_t is_transposed, is_interleaved;
  int separate, pointers;
} layout;

static const layout layouts[] = {
    {"transposed", WD_TRANSPOSED_ALL, 0, 0, 0},
    {"down transposed", WD_TRANSPOSED_DOWN, 0, 0, 0},
    {"interleaved", 0, 1, 0, 0},
    {"transposed, interleaved", WD_TRANSPOSED_ALL, 1, 0, 0},
    {"separate", 0, 0, 1, 0},
    {"separate, transposed", WD_TRANSPOSED_ALL, 0, 1, 0},
    {"pointers", 0, 0, 0, 1},
    {"pointers, transposed, interleaved", WD_TRANSPOSED_ALL, 1, 0, 1},
    {"pointers, separate", 0, 0, 1, 1},
};

/* A part of a stored layer: one tensor, or a tensor an expert and their table. */
typedef struct {
  tensor tensors[MANY_EXPERTS], table;
  int count, per_expert; /* how many tensors, and elements of an expert */
  DLTensor described;
} part;

enum { GATE_UP_PART, UP_PART, DOWN_PART, GATE_UP_BIAS_PART, UP_BIAS_PART, DOWN_BIAS_PART, PARTS };

static void part_make(part *made, kind of, int32_t ndim, const int64_t *shape, int pointers, place where) {
  *made = (part){.count = pointers ? (int)shape[0] : 1, .per_expert = (int)(shape[1] * (ndim == 3 ? shape[2] : 1))};
  for (int i = 0; i < made->count; i++)
    tensor_make(&made->tensors[i], of, pointers ? ndim - 1 : ndim, pointers ? shape + 1 : shape, where);
  made->described = made->tensors[0].dl;
  if (!pointers) return;
  made->described.data = NULL; /* not looked at */
  tensor_make(&made->table, INT64, 1, shape, where);
  for (int i = 0; i < made->count; i++)
    tensor_set_id(&made->table, i, (int64_t)(intptr_t)made->tensors[i].memory.data);
}

static void part_free(part *made) {
  for (int i = 0; i < made->count; i++)
    tensor_free(&made->tensors[i]);
  tensor_free(&made->table);
}

/* Element `to` of an expert becomes a copy of element `from` of a whole tensor. */
static void part_copy(part *made, int64_t expert, int64_t to, const tensor *source, int64_t from) {
  const size_t size = kind_size(source->of);
  tensor *const target = &made->tensors[made->count > 1 ? expert : 0];
  if (made->count == 1) to += expert * made->per_expert;
  memcpy(target->memory.data + (size_t)to * size, source->memory.data + (size_t)from * size, size);
}

/* The layer of a call, with biases, stored in a layout; the biases of the standard one are [E, 2I] and [E, H]. */
static void store(part parts[PARTS], const call *c, const tensor *bias, const tensor *down_bias, layout as) {
  const sizes *s = &c->sizes;
  const int64_t E = s->experts, H = s->hidden, I = s->intermediate, rows = as.separate ? I : 2 * I;
  const int all = as.is_transposed == WD_TRANSPOSED_ALL;
  memset(parts, 0, PARTS * sizeof *parts);
  const struct {
    kind of;
    int32_t ndim;
    int64_t shape[3];
  } made[PARTS] = {
      [GATE_UP_PART] = {s->of, 3, {E, all ? H : rows, all ? rows : H}},
      [UP_PART] = {s->of, 3, {E, all ? H : I, all ? I : H}},
      [DOWN_PART] = {s->of, 3, {E, as.is_transposed ? I : H, as.is_transposed ? H : I}},
      [GATE_UP_BIAS_PART] = {bias->of, 2, {E, rows}},
      [UP_BIAS_PART] = {bias->of, 2, {E, I}},
      [DOWN_BIAS_PART] = {down_bias->of, 2, {E, H}},
  };
  for (int i = 0; i < PARTS; i++)
    if (as.separate || (i != UP_PART && i != UP_BIAS_PART))
      part_make(&parts[i], made[i].of, made[i].ndim, made[i].shape, as.pointers, s->where);
  for (int64_t e = 0; e < E; e++) {
    for (int64_t r = 0; r < 2 * I; r++) {
      const int is_up = r >= I, to = is_up && as.separate;
      const int64_t i = is_up ? r - I : r;
      const int64_t row = as.separate ? i : as.is_interleaved ? 2 * i + is_up : r;
      for (int64_t h = 0; h < H; h++)
        part_copy(&parts[to ? UP_PART : GATE_UP_PART], e, all ? h * rows + row : row * H + h, &c->tensors[GATE_UP_PROJ],
                  (e * 2 * I + r) * H + h);
      part_copy(&parts[to ? UP_BIAS_PART : GATE_UP_BIAS_PART], e, row, bias, e * 2 * I + r);
    }
    for (int64_t h = 0; h < H; h++) {
      for (int64_t i = 0; i < I; i++)
        part_copy(&parts[DOWN_PART], e, as.is_transposed ? i * H + h : h * I + i, &c->tensors[DOWN_PROJ],
                  (e * H + h) * I + i);
      part_copy(&parts[DOWN_BIAS_PART], e, h, down_bias, e * H + h);
    }
  }
}

/* A call now has the stored layer. */
static void give(call *c, const part parts[PARTS], layout as) {
  wd_moe_experts *const x = &c->experts;
  c->given[GATE_UP_PROJ] = &parts[GATE_UP_PART].described;
  c->given[DOWN_PROJ] = &parts[DOWN_PART].described;
  x->gate_up_bias = &parts[GATE_UP_BIAS_PART].described;
  x->down_bias = &parts[DOWN_BIAS_PART].described;
  x->up_proj = as.separate ? &parts[UP_PART].described : NULL;
  x->up_bias = as.separate ? &parts[UP_BIAS_PART].described : NULL;
  x->is_transposed = as.is_transposed;
  x->is_interleaved = as.is_interleaved;
  if (!as.pointers) return;
  x->gate_up_pointers = &parts[GATE_UP_PART].table.dl;
  x->down_pointers = &parts[DOWN_PART].table.dl;
  x->gate_up_bias_pointers = &parts[GATE_UP_BIAS_PART].table.dl;
  x->down_bias_pointers = &parts[DOWN_BIAS_PART].table.dl;
  x->up_pointers = as.separate ? &parts[UP_PART].table.dl : NULL;
  x->up_bias_pointers = as.separate ? &parts[UP_BIAS_PART].table.dl : NULL;
}

static void bits_of_layouts(sizes s, uint64_t seed) {
  const char *names[MANY_KERNELS];
  const int kernels = usable_kernels(names, MANY_KERNELS);
  call c;
  tensor bias, down_bias;
  call_make(&c, s, seed);
  tensor_make(&bias, s.weights, 2, (int64_t[]){s.experts, 2 * s.intermediate}, s.where);
  tensor_make(&down_bias, s.weights, 2, (int64_t[]){s.experts, s.hidden}, s.where);
  tensor_fill(&bias, seed + 1, 1.0);
  tensor_fill(&down_bias, seed + 2, 1.0);
  c.experts.gate_up_bias = &bias.dl;
  c.experts.down_bias = &down_bias.dl;
  call_succeeds(&c, GATE_UP);
  void *const intermediate = bits_of(&c.tensors[INTERMEDIATE]);
  call_succeeds(&c, FORWARD);
  void *const output = bits_of(&c.tensors[OUTPUT]);
  const wd_moe_experts standard = c.experts;
  for (size_t l = 0; l < sizeof layouts / sizeof *layouts; l++) {
    part parts[PARTS];
    store(parts, &c, &bias, &down_bias, layouts[l]);
    c.experts = standard;
    give(&c, parts, layouts[l]);
    for (int k = 0; k < kernels; k++) {
      harness_doing("%s, %s, %s, H %d, I %d", layouts[l].name, names[k], kind_name(s.of), (int)s.hidden,
                    (int)s.intermediate);
      c.options.kernel = names[k];
      call_succeeds(&c, FORWARD);
      check_same_bits(&c.tensors[OUTPUT], output, "%s, %s, %s", layouts[l].name, names[k], kind_name(s.of));
      call_succeeds(&c, GATE_UP);
      check_same_bits(&c.tensors[INTERMEDIATE], intermediate, "gate_up, %s, %s", layouts[l].name, names[k]);
      call_succeeds(&c, DOWN);
      check_same_bits(&c.tensors[OUTPUT], output, "down, %s, %s, %s", layouts[l].name, names[k], kind_name(s.of));
    }
    c.options.kernel = NULL;
    for (int i = 0; i < PARTS; i++)
      part_free(&parts[i]);
  }
  free(intermediate);
  free(output);
  tensor_free(&bias);
  tensor_free(&down_bias);
  call_free(&c);
}

/* What an older caller left behind its smaller struct is not looked at. */
static void smaller_structs(void) {
  call c;
  call_make(&c, small_sizes(BFLOAT16), 1700);
  call_succeeds(&c, FORWARD);
  void *const expected = bits_of(&c.tensors[OUTPUT]);
  memset((char *)&c.experts + offsetof(wd_moe_experts, up_proj), 0xFF,
         sizeof c.experts - offsetof(wd_moe_experts, up_proj));
  const size_t first = offsetof(wd_moe_experts, activation) + sizeof c.experts.activation;
  for (c.experts.struct_size = first; c.experts.struct_size <= offsetof(wd_moe_experts, up_proj);
       c.experts.struct_size += 4) {
    call_succeeds(&c, FORWARD);
    check_same_bits(&c.tensors[OUTPUT], expected, "a struct of %zu bytes", c.experts.struct_size);
  }
  free(expected);
  call_free(&c);
}

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
  store(parts, c, &bias, &down_bias, pointers);
  give(c, parts, pointers);
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
  for (int i = 0; i < PARTS; i++)
    part_free(&parts[i]);
  tensor_free(&bias);
  tensor_free(&down_bias);
}

/* CUDA's refusals need no device. Its tensors lie where reading them would end the program. */
static void refused_on_cuda(void) {
  const DLDevice cuda = {kDLCUDA, 0};
  call c;
  call_make(&c, small_sizes(BFLOAT16), 1701);
  memory nowhere = memory_take(0, BEGINS_AT_GUARD);
  DLTensor matrices[2] = {c.tensors[GATE_UP_PROJ].dl, c.tensors[DOWN_PROJ].dl};
  for (int i = 0; i < 2; i++) {
    matrices[i].device = cuda;
    matrices[i].data = nowhere.data;
  }
  c.given[GATE_UP_PROJ] = &matrices[0];
  c.given[DOWN_PROJ] = &matrices[1];
  DLTensor bias = {.data = nowhere.data,
                   .device = cuda,
                   .ndim = 2,
                   .dtype = kind_dtype(FLOAT32),
                   .shape = (int64_t[]){c.sizes.experts, c.sizes.hidden}};
  const wd_moe_experts sound = c.experts;
  static const char rest[] = "which no CUDA kernel serves; expected CPU memory";
  c.experts.limit = 7.0f;
  call_refused(&c, FORWARD, WD_UNSUPPORTED, "experts: limit was set, %s", rest);
  c.experts = sound;
  c.experts.down_bias = &bias;
  call_refused(&c, FORWARD, WD_UNSUPPORTED, "down_bias was given, %s", rest);
  c.experts = sound;
  c.experts.activation = WD_ACTIVATION_GELU;
  call_refused(&c, FORWARD, WD_UNSUPPORTED, "experts: activation was none of silu and gelu_tanh, %s", rest);
  c.experts = sound;
  c.experts.is_interleaved = 1;
  call_refused(&c, FORWARD, WD_UNSUPPORTED, "experts: is_interleaved was set, %s", rest);
  size_t bytes = 0;
  c.experts.gate_up_proj = &matrices[0];
  c.experts.down_proj = &matrices[1];
  check_error(wd_moe_workspace_size(&c.experts, 1, 1, &bytes), WD_UNSUPPORTED, "experts: is_interleaved was set, %s",
              rest);
  memory_free(&nowhere);
  call_free(&c);
}

void test_layouts(void) {
  static const int64_t shapes[][2] = {{8, 8}, {24, 40}, {40, 24}, {104, 72}, {136, 200}}; /* H, I */
  for (int of = 0; of < FLOAT_KINDS; of++)
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
      for (int where = ENDS_AT_GUARD; where <= BEGINS_AT_GUARD; where++) {
        sizes s = small_sizes((kind)of);
        s.hidden = shapes[i][0];
        s.intermediate = shapes[i][1];
        s.tokens = i % 2 ? 15 : 3; /* 15: an expert has more routes than a block of any loop has */
        s.weights = i % 2 ? FLOAT32 : (kind)of;
        s.where = (place)where;
        bits_of_layouts(s, 1600 + i);
      }
  smaller_structs();
  call c;
  call_make(&c, small_sizes(BFLOAT16), 1702);
  refused_numbers(&c);
  refused_tables(&c);
  call_succeeds(&c, FORWARD);
  call_free(&c);
  refused_on_cuda();
}
