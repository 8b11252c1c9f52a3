/* test_bits.c - the bits depend on nothing but the token, its routing and the weights: not on the kernel, the threads,
 * the other tokens, the caller's floating-point environment. */
#include "call.h"
#include "harness.h"
#include <fenv.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MANY_KERNELS = 16 };

/* Runs all three operations and compares with the bits of a call of all defaults. */
typedef struct {
  void *output, *intermediate;
} expected_bits;

static expected_bits expect(call *c) {
  expected_bits bits;
  call_succeeds(c, GATE_UP);
  bits.intermediate = bits_of(&c->tensors[INTERMEDIATE]);
  call_succeeds(c, FORWARD);
  bits.output = bits_of(&c->tensors[OUTPUT]);
  return bits;
}

static void compare(call *c, const expected_bits *bits, const char *title) {
  call_succeeds(c, FORWARD);
  check_same_bits(&c->tensors[OUTPUT], bits->output, "forward, %s, %s", kind_name(c->sizes.of), title);
  call_succeeds(c, GATE_UP);
  check_same_bits(&c->tensors[INTERMEDIATE], bits->intermediate, "gate_up, %s, %s", kind_name(c->sizes.of), title);
  call_succeeds(c, DOWN);
  check_same_bits(&c->tensors[OUTPUT], bits->output, "down, %s, %s", kind_name(c->sizes.of), title);
}

static void release(expected_bits *bits) {
  free(bits->output);
  free(bits->intermediate);
}

/* T and K give each expert more routes than a kernel works on at once, and the last of several blocks a rest; H and I
 * end in every way modulo 32. */
static void kernels(void) {
  static const int64_t shapes[][5] = {
      /* T, K, E, H, I */
      {1, 1, 1, 8, 16}, {64, 3, 4, 40, 24}, {7, 2, 3, 104, 56}, {3, 2, 2, 96, 136}, {2, 4, 3, 272, 264},
  };
  const char *names[MANY_KERNELS];
  const int count = usable_kernels(names, MANY_KERNELS);
  if (count == 1) harness_skip("kernels against each other: %s is the only one usable here", names[0]);
  for (int of = 0; of < FLOAT_KINDS; of++)
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
      for (int32_t activation = WD_ACTIVATION_SILU; activation <= WD_ACTIVATION_RELU2; activation++) {
        sizes s = small_sizes((kind)of);
        s.tokens = shapes[i][0];
        s.top_k = shapes[i][1];
        s.experts = shapes[i][2];
        s.hidden = shapes[i][3];
        s.intermediate = shapes[i][4];
        s.activation = activation;
        call c;
        call_make(&c, s, 400 + i);
        /* Zeros, large and small values, infinities and NaN must take the same way through every kernel. */
        static const double odd[] = {0.0,        -0.0, 1e4, -6e4, 1e-4, -6e-5, (double)INFINITY, -(double)INFINITY,
                                     (double)NAN};
        if (i == 2)
          for (int64_t j = 0; j < 9; j++)
            tensor_set(&c.tensors[HIDDEN_STATES], 104 * (j / 3 + 1) + 5 * j, odd[j]);
        expected_bits bits = expect(&c);
        for (int k = 0; k < count; k++) {
          harness_doing("kernel %s", names[k]);
          c.options.kernel = names[k];
          compare(&c, &bits, names[k]);
        }
        release(&bits);
        call_free(&c);
      }
}

/* Small calls are not shared with a pool; these are large enough for every loop that can be. */
static void pools(void) {
  static const int64_t shapes[][5] = {{8, 2, 4, 256, 104}, {512, 1, 3, 512, 8}, {512, 1, 3, 8, 512}, {3, 2, 3, 24, 16}};
  static const int32_t counts[] = {1, 2, 5};
  for (size_t p = 0; p < sizeof counts / sizeof *counts; p++) {
    wd_threads *pool = NULL;
    CHECK(wd_threads_create(counts[p], &pool) == WD_OK, "a pool of %d threads: %s", counts[p], wd_last_error());
    for (int of = 0; of < FLOAT_KINDS; of++)
      for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        sizes s = small_sizes((kind)of);
        s.tokens = shapes[i][0];
        s.top_k = shapes[i][1];
        s.experts = shapes[i][2];
        s.hidden = shapes[i][3];
        s.intermediate = shapes[i][4];
        call c;
        call_make(&c, s, 500 + i);
        expected_bits bits = expect(&c);
        c.options.threads = pool;
        for (int repeat = 0; repeat < 2; repeat++)
          compare(&c, &bits, counts[p] == 1 ? "1 thread" : "several threads");
        release(&bits);
        call_free(&c);
      }
    wd_threads_destroy(pool);
  }
}

/* A call of tokens [first, first + count) of another call: the same bits as in their place there. */
static void check_part(const call *whole, int64_t first, int64_t count) {
  sizes s = whole->sizes;
  s.tokens = count;
  call part;
  call_make(&part, s, 1);
  static const int copied[] = {GATE_UP_PROJ, DOWN_PROJ, HIDDEN_STATES, TOPK_IDS, TOPK_WEIGHTS};
  for (size_t i = 0; i < sizeof copied / sizeof *copied; i++) {
    const tensor *from = &whole->tensors[copied[i]];
    const memory *to = &part.tensors[copied[i]].memory;
    const size_t row = copied[i] <= DOWN_PROJ ? 0 : from->memory.bytes / (size_t)whole->sizes.tokens;
    memcpy(to->data, from->memory.data + (size_t)first * row, to->bytes);
  }
  call_succeeds(&part, FORWARD);
  const tensor *output = &whole->tensors[OUTPUT];
  const size_t row = output->memory.bytes / (size_t)whole->sizes.tokens;
  check_same_bits(&part.tensors[OUTPUT], output->memory.data + (size_t)first * row,
                  "%s, tokens %d to %d alone and in a call of %d", kind_name(s.of), (int)first,
                  (int)(first + count - 1), (int)whole->sizes.tokens);
  call_free(&part);
}

static void batches(void) {
  for (int of = 0; of < FLOAT_KINDS; of++) {
    sizes s = small_sizes((kind)of);
    s.tokens = 61;
    s.top_k = 3;
    s.hidden = 72;
    s.intermediate = 40;
    call c;
    call_make(&c, s, 600);
    call_succeeds(&c, FORWARD);
    for (int64_t token = 0; token < s.tokens; token++)
      check_part(&c, token, 1);
    check_part(&c, 0, 30);
    check_part(&c, 30, 31);
    call_free(&c);
  }
}

/* More routes than one pass serves: the workspace stops growing, and the bits know nothing of the passes. */
static void passes(void) {
  sizes s = small_sizes(BFLOAT16);
  s.tokens = 40000;
  s.hidden = 8;
  s.intermediate = 8;
  call c;
  call_make(&c, s, 700);
  size_t twice = 0, endless = 0;
  CHECK(wd_moe_workspace_size(&c.experts, 2 * s.tokens, s.top_k, &twice) == WD_OK && twice == c.given_workspace_size,
        "the workspace of 80000 tokens takes %zu bytes, of 40000 %zu", twice, c.given_workspace_size);
  CHECK(wd_moe_workspace_size(&c.experts, INT64_MAX, s.top_k, &endless) == WD_OK && endless == twice,
        "the workspace of 2^63 - 1 tokens takes %zu bytes, of 80000 %zu", endless, twice);
  expected_bits bits = expect(&c);
  call_runs_both_halves(&c);
  check_same_bits(&c.tensors[OUTPUT], bits.output, "gate_up and down in passes against forward");
  check_part(&c, 0, 13000);
  check_part(&c, 13000, 27000);
  static const int64_t alone[] = {0, 16383, 16384, 16385, 32767, 32768, 32769, 39999};
  for (size_t i = 0; i < sizeof alone / sizeof *alone; i++)
    check_part(&c, alone[i], 1);
  release(&bits);
  call_free(&c);
}

/* A caller that rounds in another direction gets the same bits and keeps its direction. */
static void floating_point_environment(void) {
  static const int directions[] = {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
  for (int of = 0; of < FLOAT_KINDS; of++) {
    call c;
    call_make(&c, small_sizes((kind)of), 800);
    expected_bits bits = expect(&c);
    for (size_t i = 0; i < sizeof directions / sizeof *directions; i++) {
      fesetround(directions[i]);
      const wd_status status = call_run(&c, FORWARD);
      const int direction = fegetround();
      fesetround(FE_TONEAREST);
      CHECK(status == WD_OK && direction == directions[i], "the caller's rounding direction became %d", direction);
      check_same_bits(&c.tensors[OUTPUT], bits.output, "%s, rounding direction %d", kind_name((kind)of), direction);
    }
    release(&bits);
    call_free(&c);
  }
}

void test_bits(void) {
  kernels();
  pools();
  batches();
  passes();
  floating_point_environment();
}
