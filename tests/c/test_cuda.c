/* test_cuda.c - CUDA tensors where CUDA cannot be used: the status and a sentence that says what to do. Their memory
 * lies where reading it would end the program. */
#include "call.h"
#include "harness.h"
#include <string.h>

static int says_any(const char *const *words, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (strstr(wd_last_error(), words[i]) != NULL) return 1;
  return 0;
}

/* How to get a build with CUDA; or the driver, or that it has no device. */
static void check_no_cuda(wd_status status, int32_t compiled, const char *what) {
  static const char *const how[] = {"WARPDECODE_CUDA=on"}, *const why[] = {"driver", "device"};
  CHECK(status == WD_NO_CUDA && strncmp(wd_last_error(), "CUDA: ", 6) == 0 &&
            (compiled ? says_any(why, 2) : says_any(how, 1) && strstr(wd_last_error(), "CPU-only") != NULL),
        "%s gave status %d: %s", what, (int)status, wd_last_error());
}

/* Moves all tensors to a device, their data to an address that faults. */
static void move(call *c, DLTensor moved[TENSORS], DLDevice device, void *data) {
  for (int i = 0; i < TENSORS; i++) {
    moved[i] = c->tensors[i].dl;
    moved[i].device = device;
    /* Apart from each other, or they would overlap. */
    moved[i].data = (void *)((uintptr_t)data + (uintptr_t)i * 65536);
    c->given[i] = &moved[i];
  }
}

static void queries(int32_t compiled, int32_t usable) {
  int32_t count = -1;
  check_error(wd_cuda_device_count(NULL), WD_INVALID_ARGUMENT,
              "count: was NULL, expected a place for the number of devices");
  const wd_status status = wd_cuda_device_count(&count);
  wd_cuda_device_info info = {.struct_size = sizeof info};
  if (!usable) {
    check_no_cuda(status, compiled, "wd_cuda_device_count");
    CHECK(count == 0, "a failing wd_cuda_device_count wrote %d", count);
    check_no_cuda(wd_get_cuda_device_info(0, &info), compiled, "wd_get_cuda_device_info");
    CHECK(info.name[0] == 0 && info.memory_bytes == 0, "a failing wd_get_cuda_device_info wrote");
  } else {
    CHECK(wd_get_cuda_device_info(0, &info) == WD_OK && info.name[0] != 0 && info.num_sms > 0, "device 0: %s",
          wd_last_error());
    check_error(wd_get_cuda_device_info(count, &info), WD_INVALID_ARGUMENT, "device: was %d, expected 0 to %d", count,
                count - 1);
    check_error(wd_get_cuda_device_info(-1, &info), WD_INVALID_ARGUMENT, "device: was -1, expected 0 to %d", count - 1);
  }
  if (!compiled) return; /* a CPU-only build has one sentence for everything */
  check_error(wd_get_cuda_device_info(0, NULL), WD_INVALID_ARGUMENT, "info: was NULL, expected a wd_cuda_device_info");
  info.struct_size = sizeof info - 1;
  check_error(wd_get_cuda_device_info(0, &info), WD_INVALID_ARGUMENT,
              "info: struct_size was %zu, expected %zu, as in the warpdecode.h of version %s", sizeof info - 1,
              sizeof info, wd_version());
}

static void rows(int32_t usable) {
  for (int32_t i = 0; i < wd_kernel_count(); i++) {
    wd_kernel_info row = {.struct_size = sizeof row};
    CHECK(wd_get_kernel_info(i, &row) == WD_OK, "row %d: %s", i, wd_last_error());
    if (row.device_type == kDLCUDA) CHECK(row.usable == usable, "%s says usable %d", row.name, row.usable);
  }
}

/* What is checked before the device is asked: it does not take one. */
static void refusals(call *c, DLTensor moved[TENSORS], memory *nowhere) {
  for (int i = 0; i < OPERATIONS; i++) {
    const operation of = (operation)i;
    c->options.kernel = "cpu_generic";
    call_refused(c, of, WD_INVALID_ARGUMENT,
                 "options: kernel was \"cpu_generic\", which runs on the CPU, but the tensors are on CUDA");
    c->options.kernel = NULL;
    moved[DOWN_PROJ].device.device_id = 1;
    call_refused(c, of, WD_INVALID_ARGUMENT, "down_proj: was on cuda:1, expected cuda:0 as gate_up_proj");
    moved[DOWN_PROJ].device.device_id = 0;
    moved[TOPK_IDS].data = (unsigned char *)nowhere->data + 1;
    call_refused(
        c, of, WD_INVALID_ARGUMENT,
        "topk_ids: data (byte_offset included) was 1 bytes past a multiple of 8, expected an address aligned to 8 "
        "bytes");
    moved[TOPK_IDS].data = nowhere->data + (size_t)TOPK_IDS * 65536;
  }
}

static void float32_is_for_cpus(void) {
  call c;
  call_make(&c, small_sizes(FLOAT32), 1601);
  DLTensor moved[TENSORS];
  move(&c, moved, (DLDevice){kDLCUDA, 0}, c.tensors[OUTPUT].dl.data);
  for (int i = 0; i < OPERATIONS; i++)
    call_refused(&c, (operation)i, WD_UNSUPPORTED,
                 "gate_up_proj: dtype was float32, expected bfloat16 or float16 (float32: CPU only)");
  call_free(&c);
}

void test_cuda(void) {
  wd_build_info build = {.struct_size = sizeof build};
  CHECK(wd_get_build_info(&build) == WD_OK, "build info: %s", wd_last_error());
  int32_t devices = 0;
  const int32_t usable = wd_cuda_device_count(&devices) == WD_OK && devices > 0;
  queries(build.cuda_compiled, usable);
  rows(usable);

  memory nowhere = memory_take(0, BEGINS_AT_GUARD);
  for (int of = FLOAT16; of <= BFLOAT16; of++) {
    call c;
    call_make(&c, small_sizes((kind)of), 1600);
    DLTensor moved[TENSORS];
    move(&c, moved, (DLDevice){kDLCUDA, 0}, nowhere.data);
    refusals(&c, moved, &nowhere);
    if (usable) {
      harness_skip("%s tensors on CUDA without a usable device: this machine has %d", kind_name((kind)of), devices);
    } else {
      unsigned char *const sink = c.tensors[HIDDEN_STATES].memory.data;
      check_no_cuda(wd_read_memory(&moved[HIDDEN_STATES], sink, NULL, NULL), build.cuda_compiled, "wd_read_memory");
      c.given_workspace_size = SIZE_MAX; /* what a CUDA call wants is for the CUDA side to say */
      for (int i = 0; i < OPERATIONS; i++) {
        memory_poison(&c.tensors[INTERMEDIATE].memory);
        check_no_cuda(call_run(&c, (operation)i), build.cuda_compiled, operation_name((operation)i));
        CHECK(memory_is_poisoned(&c.workspace) && memory_is_poisoned(&c.tensors[INTERMEDIATE].memory) &&
                  memory_is_poisoned(&c.tensors[OUTPUT].memory),
              "%s wrote without CUDA", operation_name((operation)i));
      }
    }
    call_free(&c);
  }
  memory_free(&nowhere);
  float32_is_for_cpus();
}
