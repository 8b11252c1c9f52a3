/* test_info.c - version, build, table of kernels, thread pools: the functions without tensors. */
#include "call.h"
#include "harness.h"
#include <stdio.h>
#include <string.h>

static void versions(void) {
  char header[32];
  snprintf(header, sizeof header, "%d.%d.%d", WD_VERSION_MAJOR, WD_VERSION_MINOR, WD_VERSION_PATCH);
  CHECK(strcmp(wd_version(), header) == 0, "the library is %s, the header %s", wd_version(), header);
  CHECK(wd_version() == wd_version() && strlen(wd_numerics_id()) > 0, "version and numerics id are static texts");
}

static int32_t build(void) {
  wd_build_info info;
  memset(&info, 0xFF, sizeof info);
  info.struct_size = sizeof info;
  CHECK(wd_get_build_info(&info) == WD_OK, "build info: %s", wd_last_error());
  CHECK(info.cuda_compiled == 0 || info.cuda_compiled == 1, "cuda_compiled was %d", info.cuda_compiled);
  CHECK((info.cuda_runtime_version > 0) == info.cuda_compiled, "cuda_runtime_version was %d",
        info.cuda_runtime_version);
  CHECK((strlen(info.cuda_architectures) > 0) == info.cuda_compiled, "cuda_architectures was \"%s\"",
        info.cuda_architectures);
  CHECK(strlen(info.compiler) > 0, "compiler was empty");

  check_error(wd_get_build_info(NULL), WD_INVALID_ARGUMENT, "info: was NULL, expected a wd_build_info");
  static const size_t wrong[] = {0, sizeof info - 1, sizeof info + 1, SIZE_MAX};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    wd_build_info untouched;
    memset(&info, 0xFF, sizeof info);
    info.struct_size = wrong[i];
    memcpy(&untouched, &info, sizeof info);
    check_error(wd_get_build_info(&info), WD_INVALID_ARGUMENT,
                "info: struct_size was %zu, expected %zu, as in the warpdecode.h of version %s", wrong[i], sizeof info,
                wd_version());
    CHECK(memcmp(&info, &untouched, sizeof info) == 0, "build info was written although its size is wrong");
  }
  info.struct_size = sizeof info;
  (void)wd_get_build_info(&info);
  return info.cuda_compiled;
}

static void kernel_table(int32_t cuda_compiled) {
  const int32_t count = wd_kernel_count();
  int cpu = 0, usable_cpu = 0, cuda = 0;
  for (int32_t i = 0; i < count; i++) {
    wd_kernel_info row = {.struct_size = sizeof row, .usable = -1};
    CHECK(wd_get_kernel_info(i, &row) == WD_OK, "row %d: %s", i, wd_last_error());
    CHECK(row.name != NULL && strlen(row.name) > 0 && row.description != NULL && strlen(row.description) > 0 &&
              strchr(row.description, '\n') == NULL,
          "row %d has no name or no description of one line", i);
    CHECK(row.device_type == kDLCPU || row.device_type == kDLCUDA, "row %d: device type %d", i, row.device_type);
    CHECK(row.usable == 0 || row.usable == 1, "row %d: usable is %d", i, row.usable);
    cpu += row.device_type == kDLCPU;
    usable_cpu += row.device_type == kDLCPU && row.usable;
    cuda += row.device_type == kDLCUDA;
    for (int32_t j = 0; j < i; j++) {
      wd_kernel_info other = {.struct_size = sizeof other};
      CHECK(wd_get_kernel_info(j, &other) == WD_OK && strcmp(other.name, row.name) != 0, "two rows are called %s",
            row.name);
    }
  }
  CHECK(cpu >= 1 && usable_cpu >= 1, "%d CPU rows, %d usable: every machine can run one", cpu, usable_cpu);
  CHECK((cuda > 0) == cuda_compiled, "%d CUDA rows in a build with cuda_compiled %d", cuda, cuda_compiled);

  wd_kernel_info row = {.struct_size = sizeof row};
  static const int32_t beyond[] = {-1, INT32_MIN, INT32_MAX};
  for (size_t i = 0; i < 4; i++) {
    const int32_t index = i < 3 ? beyond[i] : count;
    check_error(wd_get_kernel_info(index, &row), WD_INVALID_ARGUMENT, "index: was %d, expected 0 to %d", index,
                count - 1);
  }
  CHECK(row.name == NULL, "a row that does not exist was written");
  check_error(wd_get_kernel_info(0, NULL), WD_INVALID_ARGUMENT, "info: was NULL, expected a wd_kernel_info");
  static const size_t wrong[] = {0, sizeof row - 1, sizeof row + 1};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    row.struct_size = wrong[i];
    check_error(wd_get_kernel_info(0, &row), WD_INVALID_ARGUMENT,
                "info: struct_size was %zu, expected %zu, as in the warpdecode.h of version %s", wrong[i], sizeof row,
                wd_version());
    CHECK(row.name == NULL, "a row was written although its size is wrong");
  }
}

static void pools(void) {
  wd_threads *pool = NULL;
  check_error(wd_threads_create(2, NULL), WD_INVALID_ARGUMENT, "threads: was NULL, expected a place for the pool");
  static const int32_t wrong[] = {0, -1, INT32_MIN};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    check_error(wd_threads_create(wrong[i], &pool), WD_INVALID_ARGUMENT,
                "count: was %d, expected 1 (the caller alone) or more", wrong[i]);
    CHECK(pool == NULL, "a pool of %d threads came back", wrong[i]);
  }
  for (int32_t count = 1; count <= 3; count++) {
    CHECK(wd_threads_create(count, &pool) == WD_OK && pool != NULL, "a pool of %d threads: %s", count, wd_last_error());
    wd_threads_destroy(pool);
  }
  wd_threads_destroy(NULL);
  CHECK(1, "a pool that is NULL is destroyed");
}

void test_info(void) {
  CHECK(strcmp(wd_last_error(), "") == 0, "the last error before the first was: %s", wd_last_error());
  versions();
  const int32_t cuda_compiled = build();
  kernel_table(cuda_compiled);
  pools();

  (void)wd_get_build_info(NULL);
  const char *before = wd_last_error();
  wd_kernel_info row = {.struct_size = sizeof row};
  CHECK(wd_get_kernel_info(0, &row) == WD_OK && wd_last_error() == before &&
            strcmp(before, "info: was NULL, expected a wd_build_info") == 0,
        "a call that succeeds changed the last error to: %s", wd_last_error());
}
