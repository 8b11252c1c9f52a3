/* tensor.h - tensors between guard pages, filled with numbers that are the same on every machine. */
#ifndef TENSOR_H
#define TENSOR_H

#include <stddef.h>
#include <stdint.h>
#include <warpdecode.h>

typedef enum { FLOAT32, FLOAT16, BFLOAT16, INT32, INT64 } kind;
enum { FLOAT_KINDS = 3 };

const char *kind_name(kind of);
size_t kind_size(kind of);
DLDataType kind_dtype(kind of);

/* Memory between two pages that nobody may touch: it ends where the second begins, or begins where the first ends. */
typedef enum { ENDS_AT_GUARD, BEGINS_AT_GUARD } place;

typedef struct {
  unsigned char *data;
  size_t bytes;
  void *mapping;
  size_t mapped;
} memory;

memory memory_take(size_t bytes, place where);
void memory_free(memory *taken);

/* Fills with 0xFF, which is a NaN in every float type and -1 in every integer type. */
void memory_poison(const memory *taken);
int memory_is_poisoned(const memory *taken);

/* A compact tensor on the CPU. It points into itself: never copied by value (its `dl` may be, while it lives). */
typedef struct {
  DLTensor dl; /* strides NULL */
  int64_t shape[4];
  int64_t elements;
  kind of;
  memory memory;
} tensor;

void tensor_make(tensor *made, kind of, int32_t ndim, const int64_t *shape, place where);
void tensor_free(tensor *made);

/* Element `index` of the flat tensor, exactly (an INT64 beyond 2^53 is the exception). */
double tensor_get(const tensor *from, int64_t index);

/* Rounds toward zero to the tensor's type; float16 below 2^-14 becomes 0. */
void tensor_set(tensor *to, int64_t index, double value);
void tensor_set_id(tensor *to, int64_t index, int64_t id);

/* Numbers between -bound and bound; the same seed gives the same numbers. */
void tensor_fill(tensor *to, uint64_t seed, double bound);

/* A number in [0, limit). */
uint64_t random_below(uint64_t seed, uint64_t index, uint64_t limit);

#endif /* TENSOR_H */
