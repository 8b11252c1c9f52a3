/* tensor.h - checks of borrowed DLPack tensors. Every failure names the argument, what it was and what was expected. */
#ifndef WD_TENSOR_H
#define WD_TENSOR_H

#include "args.h"
#include "check.h"

/* An axis whose length is free in wd_check_shape. */
#define WD_ANY (-1)

/* First address of the tensor's elements, byte_offset included. */
static inline void *wd_tensor_data(const DLTensor *tensor) {
  return (char *)tensor->data + tensor->byte_offset;
}

/* Rank, shape (WD_ANY: any length), compact strides; `letters` is the shape as documented, e.g. "[T, H]". */
wd_status wd_check_shape(const DLTensor *tensor, const char *name, int32_t ndim, const int64_t *shape,
                         const char *letters);

/* The element type: *dtype becomes it. `float32_too` says whether float32 is served. */
wd_status wd_check_float(const DLTensor *tensor, const char *name, int float32_too, wd_dtype *dtype);

/* Equal to `dtype`, which is that of `other`. */
wd_status wd_check_same_dtype(const DLTensor *tensor, const char *name, wd_dtype dtype, const char *other);

/* `dtype` or float32; *own becomes it. */
wd_status wd_check_float_or(const DLTensor *tensor, const char *name, wd_dtype dtype, wd_dtype *own);

/* int64 or uint64. */
wd_status wd_check_addresses(const DLTensor *tensor, const char *name);

/* int32 or int64; *bytes becomes 4 or 8. */
wd_status wd_check_ids(const DLTensor *tensor, const char *name, int32_t *bytes);

/* No more elements than memory can hold; data present (unless there are none) and aligned to `alignment` bytes. */
wd_status wd_check_data(const DLTensor *tensor, const char *name, size_t alignment);

/* On the same device as `other`; CPU memory and pinned CPU memory count as one device. */
wd_status wd_check_device(const DLTensor *tensor, const char *name, DLDevice device, const char *other);

/* The output's bytes are disjoint from the input's. */
wd_status wd_check_disjoint(const DLTensor *output, const char *output_name, const DLTensor *input,
                            const char *input_name);

/* Bytes of the tensor's elements; SIZE_MAX where they are no size_t. */
size_t wd_tensor_bytes(const DLTensor *tensor);

#endif /* WD_TENSOR_H */
