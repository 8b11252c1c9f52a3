/* tensor.c - guard pages, element types, deterministic numbers. */
#include "tensor.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const char *kind_name(kind of) {
  static const char *const names[] = {"float32", "float16", "bfloat16", "int32", "int64"};
  return names[of];
}

size_t kind_size(kind of) {
  return of == INT64 ? 8 : of == FLOAT32 || of == INT32 ? 4 : 2;
}

DLDataType kind_dtype(kind of) {
  static const uint8_t codes[] = {kDLFloat, kDLFloat, kDLBfloat, kDLInt, kDLInt};
  return (DLDataType){.code = codes[of], .bits = (uint8_t)(8 * kind_size(of)), .lanes = 1};
}

memory memory_take(size_t bytes, place where) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  const size_t inner = (bytes + page - 1) / page * page;
  memory taken = {.bytes = bytes, .mapped = inner + 2 * page};
  unsigned char *mapping = mmap(NULL, taken.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED || (inner > 0 && mprotect(mapping + page, inner, PROT_READ | PROT_WRITE) != 0)) {
    perror("mmap");
    exit(2);
  }
  taken.mapping = mapping;
  taken.data = mapping + page + (where == ENDS_AT_GUARD ? inner - bytes : 0);
  return taken;
}

void memory_free(memory *taken) {
  if (taken->mapping != NULL) munmap(taken->mapping, taken->mapped);
  *taken = (memory){0};
}

void memory_poison(const memory *taken) {
  if (taken->bytes > 0) memset(taken->data, 0xFF, taken->bytes);
}

int memory_is_poisoned(const memory *taken) {
  for (size_t i = 0; i < taken->bytes; i++)
    if (taken->data[i] != 0xFF) return 0;
  return 1;
}

void tensor_make(tensor *made, kind of, int32_t ndim, const int64_t *shape, place where) {
  *made = (tensor){.of = of, .elements = 1};
  for (int32_t i = 0; i < ndim; i++) {
    made->shape[i] = shape[i];
    made->elements *= shape[i];
  }
  made->memory = memory_take((size_t)made->elements * kind_size(of), where);
  made->dl = (DLTensor){
      .data = made->memory.data, .device = {kDLCPU, 0}, .ndim = ndim, .dtype = kind_dtype(of), .shape = made->shape};
}

void tensor_free(tensor *made) {
  memory_free(&made->memory);
}

static void *element(const tensor *of, int64_t index) {
  return of->memory.data + (size_t)index * kind_size(of->of);
}

static double float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? (double)NAN : (double)INFINITY)
                           : exponent == 0 ? ldexp(fraction, -24)
                                           : ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

double tensor_get(const tensor *from, int64_t index) {
  const void *at = element(from, index);
  uint16_t half;
  uint32_t word;
  uint64_t wide;
  float single;
  switch (from->of) {
  case FLOAT32:
    memcpy(&single, at, sizeof single);
    return (double)single;
  case FLOAT16:
    memcpy(&half, at, sizeof half);
    return float16_value(half);
  case BFLOAT16:
    memcpy(&half, at, sizeof half);
    word = (uint32_t)half << 16;
    memcpy(&single, &word, sizeof single);
    return (double)single;
  case INT32:
    memcpy(&word, at, sizeof word);
    return (double)(int32_t)word;
  default:
    memcpy(&wide, at, sizeof wide);
    return (double)(int64_t)wide;
  }
}

void tensor_set(tensor *to, int64_t index, double value) {
  void *at = element(to, index);
  const float single = (float)value;
  uint32_t word;
  memcpy(&word, &single, sizeof word);
  if (to->of == FLOAT32) {
    memcpy(at, &single, sizeof single);
    return;
  }
  uint16_t half = (uint16_t)(word >> 16);
  if (to->of == FLOAT16) {
    const uint32_t sign = word >> 16 & 0x8000u, magnitude = word & 0x7fffffffu;
    if (!isfinite(single))
      half = (uint16_t)(sign | (isnan(single) ? 0x7e00u : 0x7c00u));
    else
      half = (uint16_t)(sign | (magnitude < 113u << 23 ? 0 : (magnitude - (112u << 23)) >> 13));
  }
  memcpy(at, &half, sizeof half);
}

void tensor_set_id(tensor *to, int64_t index, int64_t id) {
  const int32_t narrow = (int32_t)id;
  memcpy(element(to, index), to->of == INT64 ? (const void *)&id : (const void *)&narrow, kind_size(to->of));
}

/* splitmix64, of a counter: any element can be had without the ones before it. */
static uint64_t random_bits(uint64_t seed, uint64_t index) {
  uint64_t z = ((seed << 40) ^ index) * 0x9e3779b97f4a7c15u + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

uint64_t random_below(uint64_t seed, uint64_t index, uint64_t limit) {
  return random_bits(seed, index) % limit;
}

void tensor_fill(tensor *to, uint64_t seed, double bound) {
  for (int64_t i = 0; i < to->elements; i++)
    tensor_set(to, i, bound * ((double)(int64_t)random_bits(seed, (uint64_t)i) * 0x1p-63));
}
