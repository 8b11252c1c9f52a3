/* layouts.c - stores a layer element by element, between guard pages. */
#include "layouts.h"
#include <string.h>

static void part_make(part *made, kind of, int32_t ndim, const int64_t *shape, int pointers, place where) {
  *made = (part){.count = pointers ? (int)shape[0] : 1, .per_expert = (int)(shape[1] * (ndim == 3 ? shape[2] : 1))};
  for (int i = 0; i < made->count; i++)
    tensor_make(&made->tensors[i], of, pointers ? ndim - 1 : ndim, pointers ? shape + 1 : shape, where);
  made->described = made->tensors[0].dl;
  if (!pointers) return;
  made->described.data = NULL; /* not looked at */
  tensor_make(&made->table, INT64, 1, shape, where);
  for (int i = 0; i < made->count; i++)
    tensor_set_id(&made->table, i, (int64_t)(intptr_t)made->tensors[i].memory.data);
}

static void part_free(part *made) {
  for (int i = 0; i < made->count; i++)
    tensor_free(&made->tensors[i]);
  tensor_free(&made->table);
}

/* Element `to` of an expert becomes a copy of element `from` of a whole tensor. */
static void part_copy(part *made, int64_t expert, int64_t to, const tensor *source, int64_t from) {
  const size_t size = kind_size(source->of);
  tensor *const target = &made->tensors[made->count > 1 ? expert : 0];
  if (made->count == 1) to += expert * made->per_expert;
  memcpy(target->memory.data + (size_t)to * size, source->memory.data + (size_t)from * size, size);
}

void parts_store(part parts[PARTS], const call *c, const tensor *bias, const tensor *down_bias, layout as) {
  const sizes *s = &c->sizes;
  const int64_t E = s->experts, H = s->hidden, I = s->intermediate, rows = as.separate ? I : 2 * I;
  const int all = as.is_transposed == WD_TRANSPOSED_ALL;
  memset(parts, 0, PARTS * sizeof *parts);
  const struct {
    kind of;
    int32_t ndim;
    int64_t shape[3];
  } made[PARTS] = {
      [GATE_UP_PART] = {s->of, 3, {E, all ? H : rows, all ? rows : H}},
      [UP_PART] = {s->of, 3, {E, all ? H : I, all ? I : H}},
      [DOWN_PART] = {s->of, 3, {E, as.is_transposed ? I : H, as.is_transposed ? H : I}},
      [GATE_UP_BIAS_PART] = {bias->of, 2, {E, rows}},
      [UP_BIAS_PART] = {bias->of, 2, {E, I}},
      [DOWN_BIAS_PART] = {down_bias->of, 2, {E, H}},
  };
  for (int i = 0; i < PARTS; i++)
    if (as.separate || (i != UP_PART && i != UP_BIAS_PART))
      part_make(&parts[i], made[i].of, made[i].ndim, made[i].shape, as.pointers, s->where);
  for (int64_t e = 0; e < E; e++) {
    for (int64_t r = 0; r < 2 * I; r++) {
      const int is_up = r >= I, to = is_up && as.separate;
      const int64_t i = is_up ? r - I : r;
      const int64_t row = as.separate ? i : as.is_interleaved ? 2 * i + is_up : r;
      for (int64_t h = 0; h < H; h++)
        part_copy(&parts[to ? UP_PART : GATE_UP_PART], e, all ? h * rows + row : row * H + h, &c->tensors[GATE_UP_PROJ],
                  (e * 2 * I + r) * H + h);
      part_copy(&parts[to ? UP_BIAS_PART : GATE_UP_BIAS_PART], e, row, bias, e * 2 * I + r);
    }
    for (int64_t h = 0; h < H; h++) {
      for (int64_t i = 0; i < I; i++)
        part_copy(&parts[DOWN_PART], e, as.is_transposed ? i * H + h : h * I + i, &c->tensors[DOWN_PROJ],
                  (e * H + h) * I + i);
      part_copy(&parts[DOWN_BIAS_PART], e, h, down_bias, e * H + h);
    }
  }
}

void parts_free(part parts[PARTS]) {
  for (int i = 0; i < PARTS; i++)
    part_free(&parts[i]);
}

void parts_give(call *c, const part parts[PARTS], layout as) {
  wd_moe_experts *const x = &c->experts;
  c->given[GATE_UP_PROJ] = &parts[GATE_UP_PART].described;
  c->given[DOWN_PROJ] = &parts[DOWN_PART].described;
  x->gate_up_bias = &parts[GATE_UP_BIAS_PART].described;
  x->down_bias = &parts[DOWN_BIAS_PART].described;
  x->up_proj = as.separate ? &parts[UP_PART].described : NULL;
  x->up_bias = as.separate ? &parts[UP_BIAS_PART].described : NULL;
  x->is_transposed = as.is_transposed;
  x->is_interleaved = as.is_interleaved;
  if (!as.pointers) return;
  x->gate_up_pointers = &parts[GATE_UP_PART].table.dl;
  x->down_pointers = &parts[DOWN_PART].table.dl;
  x->gate_up_bias_pointers = &parts[GATE_UP_BIAS_PART].table.dl;
  x->down_bias_pointers = &parts[DOWN_BIAS_PART].table.dl;
  x->up_pointers = as.separate ? &parts[UP_PART].table.dl : NULL;
  x->up_bias_pointers = as.separate ? &parts[UP_BIAS_PART].table.dl : NULL;
}
