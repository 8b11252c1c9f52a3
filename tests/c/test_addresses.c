/* test_addresses.c - strides, alignment, byte_offset, missing data, overlaps: where tensors and workspaces lie. */
#include "call.h"
#include "harness.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int is_written(operation of, int which) {
  return which == (of == GATE_UP ? INTERMEDIATE : OUTPUT);
}

static void compact(int64_t strides[4], const tensor *of) {
  int64_t step = 1;
  for (int32_t i = of->dl.ndim - 1; i >= 0; i--) {
    strides[i] = step;
    step *= of->shape[i];
  }
}

/* Compact strides are as good as none; any other stride is refused, on each axis. */
static void strides(call *c, operation of, int which, const void *expected) {
  const tensor *const t = &c->tensors[which];
  DLTensor strided = t->dl;
  int64_t given[4];
  strided.strides = given;
  c->given[which] = &strided;
  compact(given, t);
  call_succeeds(c, of);
  check_same_bits(&c->tensors[of == GATE_UP ? INTERMEDIATE : OUTPUT], expected, "%s with compact strides of %s",
                  operation_name(of), tensor_name(which));
  for (int32_t axis = 0; axis < t->dl.ndim; axis++)
    for (int change = 0; change < 4 && t->shape[axis] > 1; change++) {
      char was[96], shape[96];
      compact(given, t);
      if (change == 0) given[axis] += 8;
      if (change == 1) given[axis] = -given[axis];
      if (change == 2) given[axis] = 0;
      if (change == 3) given[axis] *= 2;
      numbers_text(was, given, t->dl.ndim);
      numbers_text(shape, t->shape, t->dl.ndim);
      call_refused(c, of, WD_INVALID_ARGUMENT,
                   "%s: strides were %s, expected compact row-major ones for shape %s; pass a contiguous tensor",
                   tensor_name(which), was, shape);
    }
  c->given[which] = &t->dl;
}

static size_t alignment_of(const call *c, int which) {
  return kind_size(c->tensors[which].of); /* on the CPU; CUDA's 16 bytes are refused before the driver is asked */
}

static void alignment(call *c, operation of, int which) {
  const tensor *const t = &c->tensors[which];
  const size_t expected = alignment_of(c, which);
  DLTensor moved = t->dl;
  c->given[which] = &moved;
  for (size_t by = 1; by < expected; by *= 2)
    for (int by_offset = 0; by_offset < 2; by_offset++) {
      /* downwards, so that every address stays within the tensor's pages */
      moved.data = by_offset ? t->dl.data : t->memory.data + by;
      moved.byte_offset = by_offset ? by : 0;
      const size_t rest = (size_t)((uintptr_t)t->memory.data + by) % expected;
      call_refused(
          c, of, WD_INVALID_ARGUMENT,
          "%s: data (byte_offset included) was %zu bytes past a multiple of %zu, expected an address aligned to "
          "%zu bytes",
          tensor_name(which), rest, expected, expected);
    }
  moved = t->dl;
  moved.data = NULL;
  call_refused(c, of, WD_INVALID_ARGUMENT, "%s: data was NULL, expected the tensor's elements", tensor_name(which));
  c->given[which] = &t->dl;
}

/* The elements lie `offset` bytes behind data, which is itself not aligned for some offsets, and to one
 * element alone for the last: weights mapped from a checkpoint lie anywhere. */
static void byte_offset(call *c, operation of, int which, const void *expected) {
  const tensor *const t = &c->tensors[which];
  const size_t offsets[] = {16, 48, 8, 24, 4096, kind_size(t->of)};
  for (size_t i = 0; i < sizeof offsets / sizeof *offsets; i++) {
    memory shifted = memory_take(t->memory.bytes + offsets[i], ENDS_AT_GUARD);
    memory_poison(&shifted);
    if (!is_written(of, which)) memcpy(shifted.data + offsets[i], t->memory.data, t->memory.bytes);
    DLTensor behind = t->dl;
    behind.data = shifted.data;
    behind.byte_offset = offsets[i];
    c->given[which] = &behind;
    call_succeeds(c, of);
    const tensor *const output = &c->tensors[of == GATE_UP ? INTERMEDIATE : OUTPUT];
    int untouched = 1;
    for (size_t j = 0; j < offsets[i]; j++)
      untouched &= shifted.data[j] == 0xFF;
    if (is_written(of, which)) {
      CHECK(memory_is_poisoned(&output->memory), "%s ignored the byte_offset of %s", operation_name(of),
            tensor_name(which));
      memcpy(output->memory.data, shifted.data + offsets[i], output->memory.bytes);
    }
    check_same_bits(output, expected, "%s, byte_offset %zu of %s", operation_name(of), offsets[i], tensor_name(which));
    CHECK(untouched, "%s wrote before the byte_offset %zu of %s", operation_name(of), offsets[i], tensor_name(which));
    c->given[which] = &t->dl;
    memory_free(&shifted);
  }
}

/* The written tensor laid over an input: on its first bytes, and on its last 16 alone. */
static void overlaps(call *c, operation of, int which) {
  const int written = of == GATE_UP ? INTERMEDIATE : OUTPUT;
  if (which == written) return;
  const tensor *const input = &c->tensors[which];
  unsigned char *const begin = input->memory.data;
  unsigned char *const addresses[] = {begin, begin + input->memory.bytes - 16};
  DLTensor over = c->tensors[written].dl;
  c->given[written] = &over;
  void *const before = bits_of(input);
  for (size_t i = 0; i < sizeof addresses / sizeof *addresses; i++) {
    over.data = addresses[i];
    over.byte_offset = 0;
    if (of == DOWN && which == INTERMEDIATE) memory_poison(&input->memory);
    call_refused(c, of, WD_INVALID_ARGUMENT, "%s: overlaps %s in memory, expected memory of its own",
                 tensor_name(written), tensor_name(which));
    if (which != INTERMEDIATE) check_same_bits(input, before, "%s was written by a refused call", tensor_name(which));
  }
  free(before);
  c->given[written] = &c->tensors[written].dl;
}

/* The workspace laid over a tensor, an input or the one that is written: its first bytes there, and its last. */
static void workspace_overlaps(call *c, operation of, int which) {
  const size_t needed = c->given_workspace_size;
  const tensor *const t = &c->tensors[which];
  unsigned char *const begin = t->memory.data;
  unsigned char *const addresses[] = {begin, begin + t->memory.bytes - 16, begin - needed + 16};
  void *const before = bits_of(t);
  for (size_t i = 0; i < sizeof addresses / sizeof *addresses; i++) {
    c->given_workspace = addresses[i];
    call_refused(c, of, WD_INVALID_ARGUMENT, "workspace: overlaps %s in memory, expected memory of its own",
                 tensor_name(which));
    if (!is_written(of, which) && which != INTERMEDIATE)
      check_same_bits(t, before, "%s was written by a refused call", tensor_name(which));
  }
  free(before);
  c->given_workspace = c->workspace.data;
}

/* Side by side in one buffer is no overlap: states directly before the output, ids directly behind it. */
static void neighbours(call *c, const void *expected) {
  const size_t states = c->tensors[HIDDEN_STATES].memory.bytes, output = c->tensors[OUTPUT].memory.bytes;
  const size_t ids = c->tensors[TOPK_IDS].memory.bytes;
  memory buffer = memory_take(states + output + ids, ENDS_AT_GUARD);
  memory_poison(&buffer);
  memcpy(buffer.data, c->tensors[HIDDEN_STATES].memory.data, states);
  memcpy(buffer.data + states + output, c->tensors[TOPK_IDS].memory.data, ids);
  DLTensor moved[3] = {c->tensors[HIDDEN_STATES].dl, c->tensors[OUTPUT].dl, c->tensors[TOPK_IDS].dl};
  for (size_t i = 0; i < 3; i++)
    moved[i].data = buffer.data;
  moved[1].byte_offset = states;
  moved[2].byte_offset = states + output;
  c->given[HIDDEN_STATES] = &moved[0];
  c->given[OUTPUT] = &moved[1];
  c->given[TOPK_IDS] = &moved[2];
  call_succeeds(c, FORWARD);
  memcpy(c->tensors[OUTPUT].memory.data, buffer.data + states, output);
  check_same_bits(&c->tensors[OUTPUT], expected, "an output between its inputs");
  CHECK(memcmp(buffer.data, c->tensors[HIDDEN_STATES].memory.data, states) == 0 &&
            memcmp(buffer.data + states + output, c->tensors[TOPK_IDS].memory.data, ids) == 0,
        "the neighbours of the output were written");
  c->given[HIDDEN_STATES] = &c->tensors[HIDDEN_STATES].dl;
  c->given[OUTPUT] = &c->tensors[OUTPUT].dl;
  c->given[TOPK_IDS] = &c->tensors[TOPK_IDS].dl;
  memory_free(&buffer);
}

/* An axis of one element has no neighbour to stride to: any stride is right. */
static void strides_of_single_axes(void) {
  static int64_t anything[4] = {-5, 12345, 0, 1};
  sizes s = small_sizes(BFLOAT16);
  s.tokens = 1;
  s.top_k = 1;
  call c;
  call_make(&c, s, 1201);
  anything[0] = -5;
  c.tensors[HIDDEN_STATES].dl.strides = (int64_t[]){777, 1};
  c.tensors[TOPK_IDS].dl.strides = anything;
  c.tensors[TOPK_WEIGHTS].dl.strides = anything + 1;
  c.tensors[OUTPUT].dl.strides = (int64_t[]){-3, 1};
  c.tensors[INTERMEDIATE].dl.strides = (int64_t[]){0, 9, s.intermediate, 1};
  call_succeeds(&c, FORWARD);
  call_runs_both_halves(&c);
  call_free(&c);
}

void test_addresses(void) {
  for (int of = 0; of < FLOAT_KINDS; of++) {
    call c;
    call_make(&c, small_sizes((kind)of), 1200);
    for (int i = 0; i < OPERATIONS; i++) {
      const operation operation_of = (operation)i;
      if (operation_of == DOWN) call_succeeds(&c, GATE_UP); /* fills the intermediate that down reads */
      call_succeeds(&c, operation_of);
      void *intermediate = bits_of(&c.tensors[INTERMEDIATE]);
      void *expected = bits_of(&c.tensors[operation_of == GATE_UP ? INTERMEDIATE : OUTPUT]);
      for (int which = 0; which < TENSORS; which++) {
        if (!operation_uses(operation_of, which)) continue;
        harness_doing("%s of %s", tensor_name(which), operation_name(operation_of));
        const memory *const read = &c.tensors[INTERMEDIATE].memory; /* refusals leave it poisoned */
        memcpy(read->data, intermediate, read->bytes);
        byte_offset(&c, operation_of, which, expected);
        memcpy(read->data, intermediate, read->bytes);
        strides(&c, operation_of, which, expected);
        alignment(&c, operation_of, which);
        overlaps(&c, operation_of, which);
        workspace_overlaps(&c, operation_of, which);
      }
      free(intermediate);
      free(expected);
    }
    call_succeeds(&c, FORWARD);
    void *expected = bits_of(&c.tensors[OUTPUT]);
    neighbours(&c, expected);
    free(expected);
    call_free(&c);
  }
  strides_of_single_axes();
}
