/* check.h - a failed condition becomes a status and this thread's sentence. Compiled by the C compiler and by nvcc. */
#ifndef WD_CHECK_H
#define WD_CHECK_H

#include "warpdecode.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Stores the sentence for wd_last_error() and returns status. */
wd_status wd_fail(wd_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A struct of the caller must be as large as this library's: `was`, its struct_size, tells an older or newer header. */
wd_status wd_check_struct_size(size_t was, size_t expected, const char *name);

#define WD_CHECK(condition, status, ...)                                                                               \
  do {                                                                                                                 \
    if (!(condition)) return wd_fail((status), __VA_ARGS__);                                                           \
  } while (0)

#define WD_TRY(call)                                                                                                   \
  do {                                                                                                                 \
    const wd_status wd_try_status = (call);                                                                            \
    if (wd_try_status != WD_OK) return wd_try_status;                                                                  \
  } while (0)

#ifdef __cplusplus
}
#endif
#endif /* WD_CHECK_H */
