/* test_layouts.c - the same numbers in every layout, between guard pages, have the bits of the standard one. */
#include "harness.h"
#include "layouts.h"
#include <stdlib.h>
#include <string.h>

enum { MANY_KERNELS = 16 };

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
    parts_store(parts, &c, &bias, &down_bias, layouts[l]);
    c.experts = standard;
    parts_give(&c, parts, layouts[l]);
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
    parts_free(parts);
  }
  free(intermediate);
  free(output);
  tensor_free(&bias);
  tensor_free(&down_bias);
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
}
