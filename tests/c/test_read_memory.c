/* test_read_memory.c - wd_read_memory: it reads all of a tensor and nothing beside it, and refuses what it cannot read.
 */
#include "call.h"
#include "harness.h"
#include <stdlib.h>
#include <string.h>

static const wd_options defaults = {.struct_size = sizeof defaults};

/* The argument's name begins the sentence; `was`, a part of it, tells what was wrong. */
static void refused(wd_status found, wd_status expected, const char *name, const char *was) {
  const char *text = wd_last_error();
  CHECK(found == expected && strncmp(text, name, strlen(name)) == 0 && strstr(text, was) != NULL,
        "expected status %d naming %s and \"%s\", found %d: %s", (int)expected, name, was, (int)found, text);
}

/* Lengths around every block that a loop may take at once, up to what a pool shares; before and behind a guard page. */
static void lengths(const wd_options *options) {
  static const int64_t sizes_in_16_bytes[] = {0,  1,  2,  3,  4,  5,  7,   8,   9,    15,
                                              16, 17, 31, 33, 63, 65, 255, 257, 4099, 65537};
  memory sink = memory_take(16, ENDS_AT_GUARD);
  for (size_t i = 0; i < sizeof sizes_in_16_bytes / sizeof *sizes_in_16_bytes; i++)
    for (int where = ENDS_AT_GUARD; where <= BEGINS_AT_GUARD; where++) {
      const int64_t shape[2] = {sizes_in_16_bytes[i], 8};
      tensor t;
      tensor_make(&t, BFLOAT16, 2, shape, (place)where);
      tensor_fill(&t, 1800, 1.0);
      void *before = bits_of(&t);
      harness_doing("wd_read_memory of %d bytes %s a guard page", (int)t.memory.bytes, where ? "behind" : "before");
      const wd_status status = wd_read_memory(&t.dl, sink.data, NULL, options);
      CHECK(status == WD_OK, "%d bytes gave status %d: %s", (int)t.memory.bytes, (int)status, wd_last_error());
      check_same_bits(&t, before, "wd_read_memory wrote to the memory");
      free(before);
      tensor_free(&t);
    }
  memory_free(&sink);
}

static void refusals(void) {
  memory sink = memory_take(32, ENDS_AT_GUARD);
  int64_t shape[9] = {2, 8, 1, 1, 1, 1, 1, 1, 1};
  tensor t;
  tensor_make(&t, BFLOAT16, 2, shape, ENDS_AT_GUARD);
  DLTensor changed = t.dl;
  refused(wd_read_memory(NULL, sink.data, NULL, &defaults), WD_INVALID_ARGUMENT, "memory:", "");
  changed.shape = shape;
  changed.ndim = 9;
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_INVALID_ARGUMENT, "memory:", "8 axes");
  changed.ndim = -1;
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_INVALID_ARGUMENT, "memory:", "8 axes");
  for (changed.ndim = 1; changed.ndim <= 8; changed.ndim++) {
    shape[0] = changed.ndim == 1 ? 16 : 2;
    CHECK(wd_read_memory(&changed, sink.data, NULL, NULL) == WD_OK, "%d axes: %s", changed.ndim, wd_last_error());
  }
  changed.ndim = 2;
  shape[1] = 7;
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_INVALID_ARGUMENT, "memory: had 28 bytes",
          "multiple of 16");
  shape[1] = -8;
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_INVALID_ARGUMENT, "memory: shape was [2, -8]", "");
  changed = t.dl;
  int64_t strides[2] = {16, 1};
  changed.strides = strides;
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_INVALID_ARGUMENT, "memory: strides were [16, 1]",
          "contiguous");
  changed = t.dl;
  changed.byte_offset = 2;
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_INVALID_ARGUMENT, "memory: data", "2 bytes past");
  changed = t.dl;
  changed.data = NULL;
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_INVALID_ARGUMENT, "memory: data was NULL", "");
  changed = t.dl;
  changed.device.device_type = kDLMetal;
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_UNSUPPORTED, "memory: DLPack device type was 8", "");
  changed = t.dl;
  changed.dtype = (DLDataType){kDLFloat, 32, 4};
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_UNSUPPORTED, "memory: dtype had 32 bits and 4 lanes",
          "1 lane");
  changed.dtype = (DLDataType){kDLUInt, 4, 1};
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_UNSUPPORTED, "memory: dtype had 4 bits",
          "whole bytes");
  changed = t.dl;
  changed.ndim = 0;
  changed.shape = NULL;
  refused(wd_read_memory(&changed, sink.data, NULL, &defaults), WD_INVALID_ARGUMENT, "memory: had 2 bytes", "16");
  refused(wd_read_memory(&t.dl, t.memory.data + t.memory.bytes - 16, NULL, &defaults), WD_INVALID_ARGUMENT,
          "sink: overlaps memory", "");
  refused(wd_read_memory(&t.dl, NULL, NULL, &defaults), WD_INVALID_ARGUMENT, "sink:", "16 bytes");
  refused(wd_read_memory(&t.dl, sink.data + 8, NULL, &defaults), WD_INVALID_ARGUMENT, "sink:", "16 bytes");
  wd_options wrong = defaults;
  wrong.struct_size++;
  refused(wd_read_memory(&t.dl, sink.data, NULL, &wrong), WD_INVALID_ARGUMENT, "options: struct_size was", "");
  wrong = defaults;
  wrong.kernel = "warp9";
  refused(wd_read_memory(&t.dl, sink.data, NULL, &wrong), WD_INVALID_ARGUMENT, "options: kernel was \"warp9\"",
          "lists");
  tensor_free(&t);
  memory_free(&sink);
}

void test_read_memory(void) {
  wd_options shared = defaults;
  lengths(NULL);
  CHECK(wd_threads_create(3, &shared.threads) == WD_OK, "a pool: %s", wd_last_error());
  lengths(&shared);
  wd_threads_destroy(shared.threads);
  const char *names[8];
  for (int i = usable_kernels(names, 8) - 1; i >= 0; i--) {
    const wd_options named = {.struct_size = sizeof named, .kernel = names[i]};
    lengths(&named);
  }
  refusals();
}
