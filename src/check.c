/* check.c - this thread's error sentence. */
#include "check.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[1024];

wd_status wd_fail(wd_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments); /* a longer sentence is cut: the argument comes first */
  va_end(arguments);
  return status;
}

wd_status wd_check_struct_size(size_t was, size_t expected, const char *name) {
  WD_CHECK(was == expected, WD_INVALID_ARGUMENT,
           "%s: struct_size was %zu, expected %zu, as in the warpdecode.h of version %s", name, was, expected,
           wd_version());
  return WD_OK;
}

const char *wd_last_error(void) {
  return last_error;
}
