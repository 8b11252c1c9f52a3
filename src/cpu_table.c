/* cpu_table.c - the table of CPU instruction sets, best row first, and whether this machine has them.
 *
 * The questions are asked here, in a file compiled for any machine of the architecture, because the files isa_*.c may
 * contain instructions that this machine lacks. */
#include "isa.h"

#include <stdatomic.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

typedef struct {
  const wd_cpu_isa *isa;
  int (*usable)(void);
} isa_row;

static int always(void) {
  return 1;
}

#if defined(__x86_64__)
/* clang knows no name for F16C. Asked once: in a virtual machine cpuid costs 20 us, more than a whole call. */
static int has_f16c(void) {
  enum { UNKNOWN, NO, YES };
  static atomic_int cache; /* every writer writes the same */
  int known = atomic_load_explicit(&cache, memory_order_relaxed);
  if (known == UNKNOWN) {
    unsigned eax, ebx, ecx, edx;
    known = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) ? YES : NO;
    atomic_store_explicit(&cache, known, memory_order_relaxed);
  }
  return known == YES;
}

static int has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

static const isa_row table[] = {
#if defined(__x86_64__)
    {&wd_isa_avx512, has_avx512},
    {&wd_isa_avx2, has_avx2},
#elif defined(__aarch64__)
    {&wd_isa_neon, always},
#endif
    {&wd_isa_generic, always},
};

static const int32_t rows = (int32_t)(sizeof table / sizeof table[0]);

const wd_cpu_isa *wd_cpu_isa_at(int32_t index) {
  return index >= 0 && index < rows ? table[index].isa : NULL;
}

const char *wd_cpu_isa_name(const wd_cpu_isa *isa) {
  return isa->name;
}

const char *wd_cpu_isa_description(const wd_cpu_isa *isa) {
  return isa->description;
}

int wd_cpu_isa_usable(const wd_cpu_isa *isa) {
  for (int32_t i = 0; i < rows; i++)
    if (table[i].isa == isa) return table[i].usable();
  return 0;
}
