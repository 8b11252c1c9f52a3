/* test_tensor_refusals.c - tensors that a call must refuse by their description: its exact sentence, nothing written.
 */
#include "call.h"
#include "harness.h"
#include <stdio.h>
#include <string.h>

/* A test that changes a copy of one tensor's description (its shape has room for six axes) and says what must be
 * answered. */
typedef void change_test(call *c, operation of, int which, DLTensor *changed);

/* Runs it for each operation and each tensor that the operation has. */
static void each_tensor(kind of, change_test *test) {
  call c;
  call_make(&c, small_sizes(of), 1000);
  for (int operation_index = 0; operation_index < OPERATIONS; operation_index++)
    for (int which = 0; which < TENSORS; which++) {
      if (!operation_uses((operation)operation_index, which)) continue;
      harness_doing("refusal of %s by %s", tensor_name(which), operation_name((operation)operation_index));
      int64_t shape[6] = {1, 1, 1, 1, 1, 1};
      memcpy(shape, c.tensors[which].shape, sizeof c.tensors[which].shape);
      DLTensor changed = c.tensors[which].dl;
      changed.shape = shape;
      c.given[which] = &changed;
      test(&c, (operation)operation_index, which, &changed);
      c.given[which] = &c.tensors[which].dl;
    }
  for (int i = 0; i < OPERATIONS; i++) {
    operation sound = (operation)i;
    call_succeeds(&c, sound); /* so each refusal above was for its change alone */
  }
  call_free(&c);
}

static void null(call *c, operation of, int which, DLTensor *changed) {
  (void)changed;
  c->given[which] = NULL;
  call_refused(c, of, WD_INVALID_ARGUMENT, "%s: was NULL, expected a tensor %s", tensor_name(which),
               tensor_letters(which));
}

static void rank(call *c, operation of, int which, DLTensor *changed) {
  const int32_t right = changed->ndim;
  static const int32_t ranks[] = {0, 1, 2, 3, 4, 5, -1};
  for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++) {
    if (ranks[i] == right) continue;
    changed->ndim = ranks[i];
    call_refused(c, of, WD_INVALID_ARGUMENT, "%s: had %d axes, expected %d: %s", tensor_name(which), ranks[i], right,
                 tensor_letters(which));
  }
  changed->ndim = right;
  changed->shape = NULL;
  call_refused(c, of, WD_INVALID_ARGUMENT, "%s: shape was NULL, expected %s", tensor_name(which),
               tensor_letters(which));
}

/* Every axis of every tensor, too short and too long; the two tensors that decide E, H, I, T and K have free axes. */
static void shape(call *c, operation of, int which, DLTensor *changed) {
  if (which == GATE_UP_PROJ || which == TOPK_IDS) return;
  char was[96], expected[96];
  numbers_text(expected, changed->shape, changed->ndim);
  for (int32_t axis = 0; axis < changed->ndim; axis++)
    for (int64_t by = -1; by <= 8; by += by < 0 ? 2 : 7) {
      changed->shape[axis] = c->tensors[which].shape[axis] + by;
      numbers_text(was, changed->shape, changed->ndim);
      call_refused(c, of, WD_INVALID_ARGUMENT, "%s: shape was %s, expected %s = %s", tensor_name(which), was,
                   tensor_letters(which), expected);
      changed->shape[axis] = c->tensors[which].shape[axis];
    }
}

static void negative_shape(call *c, operation of, int which, DLTensor *changed) {
  if (which != GATE_UP_PROJ && which != TOPK_IDS) return;
  for (int32_t axis = 0; axis < changed->ndim; axis++) {
    char was[96];
    changed->shape[axis] = axis == 0 ? -1 : -8;
    numbers_text(was, changed->shape, changed->ndim);
    call_refused(c, of, WD_INVALID_ARGUMENT, "%s: shape was %s, expected %s = %s", tensor_name(which), was,
                 tensor_letters(which), which == TOPK_IDS ? "[any, any]" : "[any, any, any]");
    changed->shape[axis] = c->tensors[which].shape[axis];
  }
}

static const struct {
  DLDataType dtype;
  const char *name;
} odd_types[] = {
    {{kDLInt, 16, 1}, "int16"},
    {{kDLUInt, 64, 1}, "uint64"},
    {{kDLFloat, 64, 1}, "float64"},
    {{kDLBfloat, 32, 1}, "bfloat32"},
    {{kDLComplex, 64, 1}, "complex64"},
    {{kDLBool, 8, 1}, "bool8"},
    {{kDLFloat, 16, 2}, "float16 x 2 lanes"},
    {{kDLBfloat, 16, 4}, "bfloat16 x 4 lanes"},
    {{kDLInt, 32, 2}, "int32 x 2 lanes"},
    {{200, 8, 1}, "DLPack code 200 with 8 bits"},
};

static void type_refused(call *c, operation of, int which, const char *was) {
  const char *name = tensor_name(which);
  if (which == TOPK_IDS)
    call_refused(c, of, WD_INVALID_ARGUMENT, "%s: dtype was %s, expected int32 or int64", name, was);
  else if (which == GATE_UP_PROJ || which == TOPK_WEIGHTS)
    call_refused(c, of, WD_UNSUPPORTED, "%s: dtype was %s, expected bfloat16, float16 or float32", name, was);
  else
    call_refused(c, of, WD_INVALID_ARGUMENT, "%s: dtype was %s, expected %s as gate_up_proj", name, was,
                 kind_name(c->sizes.of));
}

static void dtype(call *c, operation of, int which, DLTensor *changed) {
  for (size_t i = 0; i < sizeof odd_types / sizeof *odd_types; i++) {
    changed->dtype = odd_types[i].dtype;
    type_refused(c, of, which, odd_types[i].name);
  }
}

/* A type that is served, but not here: floats among ids, and every other float type among the layer's own. */
static void mixed_dtype(call *c, operation of, int which, DLTensor *changed) {
  for (int other = FLOAT32; other <= INT64; other++) {
    const int is_float = other < FLOAT_KINDS;
    changed->dtype = kind_dtype((kind)other);
    if (which == TOPK_WEIGHTS ? is_float : which == TOPK_IDS ? !is_float : (kind)other == c->sizes.of) continue;
    if (which != GATE_UP_PROJ || !is_float)
      type_refused(c, of, which, kind_name((kind)other));
    else /* gate_up_proj decides: the first of the others is told that it differs */
      call_refused(c, of, WD_INVALID_ARGUMENT, "down_proj: dtype was %s, expected %s as gate_up_proj",
                   kind_name(c->sizes.of), kind_name((kind)other));
  }
}

/* On another device: its memory lies where reading it would end the program. */
static void device(call *c, operation of, int which, DLTensor *changed) {
  memory elsewhere = memory_take(0, BEGINS_AT_GUARD);
  changed->data = elsewhere.data;
  static const struct {
    DLDevice device;
    const char *name;
  } devices[] = {{{kDLCUDA, 0}, "cuda:0"}, {{kDLCUDA, 3}, "cuda:3"}, {{kDLMetal, 1}, "DLPack device 8:1"}};
  for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
    changed->device = devices[i].device;
    if (which != GATE_UP_PROJ)
      call_refused(c, of, WD_INVALID_ARGUMENT, "%s: was on %s, expected cpu as gate_up_proj", tensor_name(which),
                   devices[i].name);
    else if (devices[i].device.device_type != kDLCUDA)
      call_refused(c, of, WD_UNSUPPORTED, "gate_up_proj: DLPack device type was %d, expected %d (CPU) or %d (CUDA)",
                   (int)kDLMetal, (int)kDLCPU, (int)kDLCUDA);
    else if (c->sizes.of != FLOAT32)
      call_refused(c, of, WD_INVALID_ARGUMENT, "down_proj: was on cpu, expected %s as gate_up_proj", devices[i].name);
    else
      call_refused(c, of, WD_UNSUPPORTED,
                   "gate_up_proj: dtype was float32, expected bfloat16 or float16 (float32: CPU only)");
  }
  memory_free(&elsewhere);
}

/* Pinned memory is CPU memory, whichever of the tensors lie in it and whatever the device's number. */
static void pinned(call *c, operation of, int which, DLTensor *changed) {
  (void)which;
  changed->device = (DLDevice){kDLCUDAHost, 1};
  call_succeeds(c, of);
}

/* Sizes that no kernel serves, by gate_up_proj, which decides them. */
static void sizes_not_served(call *c, operation of, int which, DLTensor *changed) {
  if (which != GATE_UP_PROJ) return;
  static const int64_t not_hidden[] = {0, 1, 7, 12, 20, 1 << 30}, not_rows[] = {0, 2, 8, 24, 40, 31, 1 << 30};
  static const int64_t not_experts[] = {0, 65536, 1ll << 40};
  const int64_t *const right = c->tensors[which].shape;
  for (size_t i = 0; i < sizeof not_hidden / sizeof *not_hidden; i++) {
    changed->shape[2] = not_hidden[i];
    call_refused(c, of, WD_UNSUPPORTED,
                 "gate_up_proj: hidden size H was %lld, expected a multiple of 8 from 8 to 16777216",
                 (long long)changed->shape[2]);
  }
  changed->shape[2] = right[2];
  for (size_t i = 0; i < sizeof not_rows / sizeof *not_rows; i++) {
    changed->shape[1] = not_rows[i];
    call_refused(c, of, WD_UNSUPPORTED,
                 "gate_up_proj: 2I was %lld rows, expected twice a multiple of 8 from 8 to 16777216",
                 (long long)changed->shape[1]);
  }
  changed->shape[1] = right[1];
  for (size_t i = 0; i < sizeof not_experts / sizeof *not_experts; i++) {
    changed->shape[0] = not_experts[i];
    call_refused(c, of, WD_INVALID_ARGUMENT, "gate_up_proj: number of experts was %lld, expected 1 to 65535",
                 (long long)changed->shape[0]);
  }
  changed->shape[0] = right[0];
}

/* K, by topk_ids, which decides it: no slot, and more than a token can have. */
static void slots(call *c, operation of, int which, DLTensor *changed) {
  if (which != TOPK_IDS) return;
  static const int64_t wrong[] = {0, 1025, 1ll << 33};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    changed->shape[1] = wrong[i];
    call_refused(c, of, WD_INVALID_ARGUMENT, "topk_ids: K, the experts per token, was %lld, expected 1 to 1024",
                 (long long)wrong[i]);
  }
}

/* Byte counts that are 0 or small when 64 bits wrap around: no memory is that large. */
static void impossible(call *c, operation of, int which, DLTensor *changed) {
  if (which != TOPK_IDS) return;
  static const int64_t tokens[] = {1ll << 61, 1ll << 60, INT64_MAX};
  for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
    char was[96];
    changed->shape[0] = tokens[i];
    changed->shape[1] = 8;
    changed->data = i == 0 ? NULL : c->tensors[which].memory.data;
    numbers_text(was, changed->shape, 2);
    call_refused(c, of, WD_INVALID_ARGUMENT, "topk_ids: shape was %s, expected at most %zu bytes", was,
                 (size_t)PTRDIFF_MAX);
  }
}

void test_tensor_refusals(void) {
  for (int of = 0; of < FLOAT_KINDS; of++) {
    each_tensor((kind)of, mixed_dtype);
    each_tensor((kind)of, device);
    each_tensor((kind)of, shape);
  }
  each_tensor(BFLOAT16, null);
  each_tensor(BFLOAT16, rank);
  each_tensor(BFLOAT16, negative_shape);
  each_tensor(BFLOAT16, dtype);
  each_tensor(BFLOAT16, pinned);
  each_tensor(BFLOAT16, sizes_not_served);
  each_tensor(BFLOAT16, slots);
  each_tensor(BFLOAT16, impossible);
}
