/* tensor.c - checks of borrowed DLPack tensors. */
#include "tensor.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* "[3, 64]" into text; too many axes end in "...". With free_axes, WD_ANY is one; without, a number like any other. */
static const char *list_text(char text[static 96], const int64_t *values, int32_t count, bool free_axes) {
  size_t used = (size_t)snprintf(text, 96, "[");
  for (int32_t i = 0; i < count; i++) {
    char item[32];
    const int length = free_axes && values[i] == WD_ANY
                           ? snprintf(item, sizeof item, "%sany", i ? ", " : "")
                           : snprintf(item, sizeof item, "%s%" PRId64, i ? ", " : "", values[i]);
    if (used + (size_t)length + 6 > 96) {
      memcpy(text + used, "...", 4);
      used += 3;
      break;
    }
    memcpy(text + used, item, (size_t)length + 1);
    used += (size_t)length;
  }
  memcpy(text + used, "]", 2);
  return text;
}

static const char *dtype_text(char text[static 48], DLDataType dtype) {
  static const char *const names[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const size_t known = sizeof names / sizeof *names;
  if (dtype.code < known)
    snprintf(text, 48, "%s%u", names[dtype.code], dtype.bits);
  else
    snprintf(text, 48, "DLPack code %u with %u bits", dtype.code, dtype.bits);
  if (dtype.lanes != 1) snprintf(text + strlen(text), 48 - strlen(text), " x %u lanes", dtype.lanes);
  return text;
}

static const char *device_text(char text[static 48], DLDevice device) {
  if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost)
    snprintf(text, 48, "cpu");
  else if (device.device_type == kDLCUDA)
    snprintf(text, 48, "cuda:%d", device.device_id);
  else
    snprintf(text, 48, "DLPack device %d:%d", (int)device.device_type, device.device_id);
  return text;
}

wd_status wd_check_shape(const DLTensor *tensor, const char *name, int32_t ndim, const int64_t *shape,
                         const char *letters) {
  char was[96], expected[96];
  WD_CHECK(tensor != NULL, WD_INVALID_ARGUMENT, "%s: was NULL, expected a tensor %s", name, letters);
  WD_CHECK(tensor->ndim == ndim, WD_INVALID_ARGUMENT, "%s: had %d axes, expected %d: %s", name, tensor->ndim, ndim,
           letters);
  WD_CHECK(tensor->shape != NULL || ndim == 0, WD_INVALID_ARGUMENT, "%s: shape was NULL, expected %s", name, letters);
  for (int32_t i = 0; i < ndim; i++)
    WD_CHECK(tensor->shape[i] >= 0 && (shape[i] == WD_ANY || tensor->shape[i] == shape[i]), WD_INVALID_ARGUMENT,
             "%s: shape was %s, expected %s = %s", name, list_text(was, tensor->shape, ndim, false), letters,
             list_text(expected, shape, ndim, true));
  if (tensor->strides == NULL) return WD_OK;
  for (int32_t i = 0; i < ndim; i++)
    if (tensor->shape[i] == 0) return WD_OK; /* no elements, no strides to follow */
  int64_t compact = 1;
  for (int32_t i = ndim - 1; i >= 0; i--) {
    if (tensor->shape[i] != 1 && tensor->strides[i] != compact)
      return wd_fail(WD_INVALID_ARGUMENT,
                     "%s: strides were %s, expected compact row-major ones for shape %s; pass a contiguous tensor",
                     name, list_text(was, tensor->strides, ndim, false),
                     list_text(expected, tensor->shape, ndim, false));
    if (__builtin_mul_overflow(compact, tensor->shape[i], &compact)) return WD_OK; /* wd_check_data refuses it */
  }
  return WD_OK;
}

static bool float_dtype(DLDataType given, wd_dtype *dtype) {
  if (given.lanes != 1) return false;
  if (given.code == kDLFloat && given.bits == 32)
    *dtype = WD_F32;
  else if (given.code == kDLFloat && given.bits == 16)
    *dtype = WD_F16;
  else if (given.code == kDLBfloat && given.bits == 16)
    *dtype = WD_BF16;
  else
    return false;
  return true;
}

wd_status wd_check_float(const DLTensor *tensor, const char *name, int float32_too, wd_dtype *dtype) {
  char was[48];
  const bool known = float_dtype(tensor->dtype, dtype);
  WD_CHECK(known && (float32_too || *dtype != WD_F32), WD_UNSUPPORTED, "%s: dtype was %s, expected bfloat16%s", name,
           dtype_text(was, tensor->dtype), float32_too ? ", float16 or float32" : " or float16 (float32: CPU only)");
  return WD_OK;
}

static const char *const dtype_names[] = {"float32", "float16", "bfloat16"}; /* by wd_dtype */

wd_status wd_check_same_dtype(const DLTensor *tensor, const char *name, wd_dtype dtype, const char *other) {
  char was[48];
  wd_dtype own = WD_F32;
  WD_CHECK(float_dtype(tensor->dtype, &own) && own == dtype, WD_INVALID_ARGUMENT, "%s: dtype was %s, expected %s as %s",
           name, dtype_text(was, tensor->dtype), dtype_names[dtype], other);
  return WD_OK;
}

wd_status wd_check_float_or(const DLTensor *tensor, const char *name, wd_dtype dtype, wd_dtype *own) {
  char was[48];
  WD_CHECK(float_dtype(tensor->dtype, own) && (*own == dtype || *own == WD_F32), WD_INVALID_ARGUMENT,
           "%s: dtype was %s, expected %s%s", name, dtype_text(was, tensor->dtype), dtype_names[dtype],
           dtype == WD_F32 ? "" : " or float32");
  return WD_OK;
}

wd_status wd_check_addresses(const DLTensor *tensor, const char *name) {
  char was[48];
  const DLDataType dtype = tensor->dtype;
  WD_CHECK((dtype.code == kDLInt || dtype.code == kDLUInt) && dtype.lanes == 1 && dtype.bits == 64, WD_INVALID_ARGUMENT,
           "%s: dtype was %s, expected int64 or uint64", name, dtype_text(was, dtype));
  return WD_OK;
}

wd_status wd_check_ids(const DLTensor *tensor, const char *name, int32_t *bytes) {
  char was[48];
  const DLDataType dtype = tensor->dtype;
  WD_CHECK(dtype.code == kDLInt && dtype.lanes == 1 && (dtype.bits == 32 || dtype.bits == 64), WD_INVALID_ARGUMENT,
           "%s: dtype was %s, expected int32 or int64", name, dtype_text(was, dtype));
  *bytes = dtype.bits / 8;
  return WD_OK;
}

size_t wd_tensor_bytes(const DLTensor *tensor) {
  size_t bytes = tensor->dtype.bits / 8u;
  for (int32_t i = 0; i < tensor->ndim; i++) {
    if (tensor->shape[i] == 0) return 0;
    if (__builtin_mul_overflow(bytes, (size_t)tensor->shape[i], &bytes)) bytes = SIZE_MAX;
  }
  return bytes;
}

wd_status wd_check_data(const DLTensor *tensor, const char *name, size_t alignment) {
  char was[96];
  const size_t bytes = wd_tensor_bytes(tensor);
  if (bytes == 0) return WD_OK;
  WD_CHECK(bytes <= PTRDIFF_MAX, WD_INVALID_ARGUMENT, "%s: shape was %s, expected at most %zu bytes", name,
           list_text(was, tensor->shape, tensor->ndim, false), (size_t)PTRDIFF_MAX);
  WD_CHECK(tensor->data != NULL, WD_INVALID_ARGUMENT, "%s: data was NULL, expected the tensor's elements", name);
  const size_t rest = (size_t)((uintptr_t)wd_tensor_data(tensor) % alignment);
  WD_CHECK(
      rest == 0, WD_INVALID_ARGUMENT,
      "%s: data (byte_offset included) was %zu bytes past a multiple of %zu, expected an address aligned to %zu bytes",
      name, rest, alignment, alignment);
  return WD_OK;
}

wd_status wd_check_device(const DLTensor *tensor, const char *name, DLDevice device, const char *other) {
  char was[48], expected[48];
  const bool host = tensor->device.device_type == kDLCPU || tensor->device.device_type == kDLCUDAHost;
  const bool other_host = device.device_type == kDLCPU || device.device_type == kDLCUDAHost;
  WD_CHECK((host && other_host) ||
               (tensor->device.device_type == device.device_type && tensor->device.device_id == device.device_id),
           WD_INVALID_ARGUMENT, "%s: was on %s, expected %s as %s", name, device_text(was, tensor->device),
           device_text(expected, device), other);
  return WD_OK;
}

wd_status wd_check_disjoint(const DLTensor *output, const char *output_name, const DLTensor *input,
                            const char *input_name) {
  const size_t output_bytes = wd_tensor_bytes(output), input_bytes = wd_tensor_bytes(input);
  if (output_bytes == 0 || input_bytes == 0) return WD_OK;
  const uintptr_t a = (uintptr_t)wd_tensor_data(output), b = (uintptr_t)wd_tensor_data(input);
  WD_CHECK(a < b ? b - a >= output_bytes : a - b >= input_bytes, WD_INVALID_ARGUMENT,
           "%s: overlaps %s in memory, expected memory of its own", output_name, input_name);
  return WD_OK;
}
