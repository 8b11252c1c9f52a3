/* test_values.c - results against the FP64 reference, for every type and activation. */
#include "harness.h"
#include "reference.h"
#include <stdio.h>
#include <stdlib.h>

/* forward, then gate_up and down, which must give the bits of forward. */
static void check_layer(sizes of, uint64_t seed) {
  static const char *const activations[] = {"silu", "gelu_tanh", "gelu", "relu", "relu2"};
  char title[160];
  snprintf(title, sizeof title, "%s, ids %s, weights %s, %s, T %d K %d E %d H %d I %d", kind_name(of.of),
           kind_name(of.ids), kind_name(of.weights), activations[of.activation], (int)of.tokens, (int)of.top_k,
           (int)of.experts, (int)of.hidden, (int)of.intermediate);
  harness_doing("%s", title);
  call c;
  call_make(&c, of, seed);
  call_succeeds(&c, FORWARD);
  check_output(&c, title);
  void *forward = bits_of(&c.tensors[OUTPUT]);
  call_runs_both_halves(&c);
  check_intermediate(&c, title);
  check_same_bits(&c.tensors[OUTPUT], forward, "gate_up and down against forward, %s", title);
  free(forward);
  call_free(&c);
}

static void shapes(void) {
  static const int64_t shapes[][5] = {
      /* T, K, E, H, I */
      {1, 1, 1, 8, 8},   {1, 2, 4, 64, 40},   {5, 3, 4, 104, 24}, {3, 8, 16, 40, 72},
      {2, 1, 3, 264, 8}, {2, 2, 3, 136, 264}, {60, 2, 2, 24, 16}, {1, 40, 3, 16, 8},
  };
  for (int of = 0; of < FLOAT_KINDS; of++)
    for (int32_t activation = WD_ACTIVATION_SILU; activation <= WD_ACTIVATION_RELU2; activation++)
      for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const sizes s = {.tokens = shapes[i][0],
                         .top_k = shapes[i][1],
                         .experts = shapes[i][2],
                         .hidden = shapes[i][3],
                         .intermediate = shapes[i][4],
                         .of = (kind)of,
                         .ids = i % 2 ? INT32 : INT64,
                         .weights = FLOAT32,
                         .activation = activation};
        check_layer(s, 100 + i);
      }
}

/* Every combination of the types of ids and routing weights, with each type of layer. */
static void routing_types(void) {
  for (int of = 0; of < FLOAT_KINDS; of++)
    for (int weights = 0; weights < FLOAT_KINDS; weights++)
      for (int ids = INT32; ids <= INT64; ids++) {
        sizes s = small_sizes((kind)of);
        s.weights = (kind)weights;
        s.ids = (kind)ids;
        check_layer(s, 200);
      }
}

/* Gates far out, where the activations are flat or steep: 0, the identity, and no NaN on the way. */
static void large_gates(void) {
  for (int of = 0; of < FLOAT_KINDS; of++)
    for (int32_t activation = WD_ACTIVATION_SILU; activation <= WD_ACTIVATION_RELU2; activation++) {
      sizes s = small_sizes((kind)of);
      s.activation = activation;
      call c;
      call_make(&c, s, 300);
      tensor_fill(&c.tensors[HIDDEN_STATES], 301, 30.0);
      call_succeeds(&c, FORWARD);
      check_output(&c, "large gates");
      call_free(&c);
    }
}

void test_values(void) {
  shapes();
  routing_types();
  large_gates();
}
