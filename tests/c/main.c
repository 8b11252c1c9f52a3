/* main.c - runs the tests whose names hold the first argument (all without one); the last line of the output says how
 * many checks passed and failed, also when a test touches memory that it must not. */
#include "harness.h"
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { SHOWN_FAILURES = 20 }; /* of a test: a broken kernel fails thousands of checks for one reason */

static long passed, failed, skipped, failed_in_test;
static char doing[256];

void harness_check(int ok, const char *file, int line, const char *format, ...) {
  if (ok) {
    passed++;
    return;
  }
  failed++;
  if (++failed_in_test > SHOWN_FAILURES) return;
  const char *slash = strrchr(file, '/');
  printf("  FAILED %s:%d: ", slash != NULL ? slash + 1 : file, line);
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  printf("\n");
}

void harness_skip(const char *format, ...) {
  skipped++;
  printf("  skipped: ");
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  printf("\n");
}

void harness_doing(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(doing, sizeof doing, format, arguments);
  va_end(arguments);
}

/* After a fault nothing can go on. printf is not for signal handlers, so the line is written as bytes; stdout is
 * unbuffered, so nothing printed before is lost. */
static void on_fault(int signal_number) {
  (void)signal_number;
  char text[512];
  const int length = snprintf(text, sizeof text,
                              "  FAILED: memory that a call must not touch was touched: %s\n%ld passed, %ld failed\n",
                              doing, passed, failed + 1);
  const ssize_t written = write(STDOUT_FILENO, text, (size_t)length);
  _exit(written == length ? 1 : 2);
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    void (*run)(void);
  } tests[] = {
      {"info", test_info},
      {"values", test_values},
      {"bits", test_bits},
      {"routing", test_routing},
      {"tensor_refusals", test_tensor_refusals},
      {"call_refusals", test_call_refusals},
      {"addresses", test_addresses},
      {"guard_pages", test_guard_pages},
      {"layouts", test_layouts},
      {"experts_refusals", test_experts_refusals},
      {"read_memory", test_read_memory},
      {"cuda", test_cuda},
      {"concurrency", test_concurrency},
  };
  setvbuf(stdout, NULL, _IONBF, 0);
  struct sigaction action = {.sa_handler = on_fault};
  sigaction(SIGSEGV, &action, NULL);
  sigaction(SIGBUS, &action, NULL);
  for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
    if (argc > 1 && strstr(tests[i].name, argv[1]) == NULL) continue;
    const long before = passed + failed;
    failed_in_test = 0;
    harness_doing("%s", tests[i].name);
    tests[i].run();
    printf("%s %s: %ld checks", failed_in_test == 0 ? "ok    " : "FAILED", tests[i].name, passed + failed - before);
    if (failed_in_test > 0) printf(", %ld failed", failed_in_test);
    printf("\n");
  }
  if (skipped > 0) printf("%ld skipped\n", skipped);
  printf("%ld passed, %ld failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
