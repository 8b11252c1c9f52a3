/* layouts.h - the layer of a call, with biases, stored again in another layout: the same numbers, elsewhere. */
#ifndef LAYOUTS_H
#define LAYOUTS_H

#include "call.h"

typedef struct {
  const char *name;
  int32_t is_transposed, is_interleaved;
  int separate, pointers;
} layout;

enum { MANY_EXPERTS = 4 };

/* A part of a stored layer: one tensor, or a tensor an expert and their table. */
typedef struct {
  tensor tensors[MANY_EXPERTS], table;
  int count, per_expert; /* how many tensors, and elements of an expert */
  DLTensor described;
} part;

enum { GATE_UP_PART, UP_PART, DOWN_PART, GATE_UP_BIAS_PART, UP_BIAS_PART, DOWN_BIAS_PART, PARTS };

/* `bias` and `down_bias` are those of the standard layout, [E, 2I] and [E, H]. Freed with parts_free. */
void parts_store(part parts[PARTS], const call *c, const tensor *bias, const tensor *down_bias, layout as);
void parts_free(part parts[PARTS]);

/* A call now has the stored layer. */
void parts_give(call *c, const part parts[PARTS], layout as);

#endif /* LAYOUTS_H */
