/* test_guard_pages.c - every buffer ends where a page begins that nobody may touch, or begins where one ends: a kernel
 * that reads or writes one byte beyond a tensor ends the program, and main.c says in which case. */
#include "harness.h"
#include "reference.h"
#include <stdlib.h>
#include <string.h>

enum { MANY_KERNELS = 16 };

/* All three operations with every kernel; the first kernel's results are kept to compare the others with. */
static void every_kernel(sizes s, uint64_t seed) {
  const char *names[MANY_KERNELS];
  const int count = usable_kernels(names, MANY_KERNELS);
  call c;
  call_make(&c, s, seed);
  void *expected = NULL;
  for (int k = 0; k < count; k++) {
    c.options.kernel = names[k];
    for (int i = 0; i < OPERATIONS; i++) {
      harness_doing("%s, %s, %s, H %d, I %d, T %d, buffers %s a guard page", operation_name((operation)i), names[k],
                    kind_name(s.of), (int)s.hidden, (int)s.intermediate, (int)s.tokens,
                    s.where == ENDS_AT_GUARD ? "before" : "behind");
      call_succeeds(&c, (operation)i);
      if (i == GATE_UP) continue;
      if (expected == NULL) expected = bits_of(&c.tensors[OUTPUT]);
      check_same_bits(&c.tensors[OUTPUT], expected, "%s, %s, H %d, I %d", names[k], kind_name(s.of), (int)s.hidden,
                      (int)s.intermediate);
    }
  }
  free(expected);
  call_free(&c);
}

void test_guard_pages(void) {
  static const int64_t lengths[] = {8, 24, 40, 104, 704};
  enum { LENGTHS = sizeof lengths / sizeof *lengths };
  for (int of = 0; of < FLOAT_KINDS; of++)
    for (int where = ENDS_AT_GUARD; where <= BEGINS_AT_GUARD; where++)
      for (int h = 0; h < LENGTHS; h++)
        for (int i = 0; i < LENGTHS; i++) {
          sizes s = small_sizes((kind)of);
          s.experts = 2;
          s.tokens = 3;
          s.hidden = lengths[h];
          s.intermediate = lengths[i];
          s.where = (place)where;
          /* Odd numbers of ids and of weights, of each type: their buffers end at no multiple of 16. */
          s.top_k = 1 + 2 * ((h + i) % 2);
          s.ids = (h + i) % 3 ? INT32 : INT64;
          s.weights = (kind)((h + 2 * i) % FLOAT_KINDS);
          every_kernel(s, 1300 + (uint64_t)(LENGTHS * h + i));
          if (h != i) continue;
          s.tokens = 1;
          every_kernel(s, 1400);
          if (s.hidden > 104) continue;
          s.tokens = 31; /* several blocks of routes of an expert, the last one not full */
          every_kernel(s, 1500);
        }
}
