/* cpu_table.c - the table of CPU instruction sets, best row first. */
#include "isa.h"

static const wd_cpu_isa *const table[] = {
    &wd_isa_generic,
};

const wd_cpu_isa *wd_cpu_isa_at(int32_t index) {
  const int32_t count = (int32_t)(sizeof table / sizeof table[0]);
  return index >= 0 && index < count ? table[index] : NULL;
}

const char *wd_cpu_isa_name(const wd_cpu_isa *isa) {
  return isa->name;
}

const char *wd_cpu_isa_description(const wd_cpu_isa *isa) {
  return isa->description;
}

int wd_cpu_isa_usable(const wd_cpu_isa *isa) {
  return isa->usable();
}
