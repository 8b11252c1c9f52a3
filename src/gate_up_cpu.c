/* gate_up_cpu.c - the first operation on the CPU:
 *
 *   gate         = sum_h x[t,h] G[e,i,h] (* weight) (+ bias),  up likewise,   e = topk_ids[t,k]
 *   inter[t,k,i] = activation(gate) * up, with the limits and offsets of wd_gating
 *
 * A work item is a tile of neurons i of one expert: its gate rows and its up rows, where the layout has them (args.h),
 * against all tokens routed to the expert, WD_MAX_VECTORS at a time. So the weights of an expert come from memory once
 * however many tokens it has. Workers take items from a counter. Before that the hidden states are widened to float,
 * once for all items. */
#include "plan_cpu.h"

#include <stdatomic.h>

typedef struct {
  const wd_gate_up_args *args;
  const wd_cpu_isa *isa;
  const wd_isa_loops *loops;
  const wd_cpu_plan *plan;
  atomic_llong next_item;
} gate_up_call;

static void widen_task(void *context, int32_t worker, int32_t workers) {
  const gate_up_call *const call = context;
  const wd_moe_shape *const shape = &call->args->shape;
  const int64_t row_bytes = shape->hidden * (int64_t)wd_dtype_size(shape->dtype);
  for (int64_t token = worker; token < shape->tokens; token += workers)
    call->loops->widen((const char *)call->args->hidden_states + token * row_bytes, NULL, shape->hidden,
                       call->plan->vectors + token * wd_lane_count(shape->hidden));
}

/* A work item: neurons [i, i + rows) of expert number `active` of the plan, for all its routes. */
typedef struct {
  int32_t active;
  int64_t i, rows;
} gate_up_item;

static const char *rows_of(const gate_up_call *call, gate_up_item item, const wd_matrix *matrix) {
  return wd_cpu_row_at(matrix, call->args->shape.dtype, call->plan->expert[item.active], item.i);
}

/* Transposed and interleaved, gate and up of a neuron are neighbours: their sums are taken as those of twice the rows,
 * which reads memory once and in one piece, and then told apart. */
static void dots_of_neighbours(const gate_up_call *call, const char *first, const char *next, int64_t rows,
                               const float *const *vectors, int32_t count, float *const *gate, float *const *up) {
  float both[WD_MAX_VECTORS][2 * WD_MAX_TILE];
  float *sums[WD_MAX_VECTORS];
  for (int32_t v = 0; v < count; v++)
    sums[v] = both[v];
  const wd_rows weights = {.first = first, .next = next, .row_stride = 1, .k_stride = call->args->gate.k_stride};
  call->loops->dots_transposed(weights, 2 * rows, call->args->shape.hidden, vectors, count, sums);
  for (int32_t v = 0; v < count; v++)
    for (int64_t j = 0; j < rows; j++) {
      gate[v][j] = both[v][2 * j];
      up[v][j] = both[v][2 * j + 1];
    }
}

/* gate[v][j] and up[v][j], the bare sums of an item's rows; `next` is the gate row of the item after it. */
static void dots_of_item(const gate_up_call *call, gate_up_item item, const char *next, const float *const *vectors,
                         int32_t count, float *const *gate, float *const *up) {
  const wd_gate_up_args *const args = call->args;
  const int64_t H = args->shape.hidden;
  const char *const gate_rows = rows_of(call, item, &args->gate);
  if (args->gate.row_stride == 2) {
    dots_of_neighbours(call, gate_rows, next, item.rows, vectors, count, gate, up);
    return;
  }
  const char *const up_rows = args->gating.has_up ? rows_of(call, item, &args->up) : next;
  wd_cpu_dots(call->loops, &args->gate, gate_rows, up_rows, item.rows, H, vectors, count, gate);
  if (args->gating.has_up) wd_cpu_dots(call->loops, &args->up, up_rows, next, item.rows, H, vectors, count, up);
}

/* The finished sums of a route: weighted, where the weight belongs to the input, then the bias. */
static void finish(const wd_gate_up_args *args, int64_t route, const float *bias, int64_t rows, float *sums) {
  if (args->topk_weights != NULL) {
    const float weight = wd_cpu_float_at(args->topk_weights, args->topk_weights_dtype, route);
    for (int64_t j = 0; j < rows; j++)
      sums[j] *= weight;
  }
  wd_cpu_add_bias(sums, bias, rows);
}

static void compute_item(const gate_up_call *call, gate_up_item item, const char *next) {
  const wd_gate_up_args *const args = call->args;
  const wd_cpu_plan *const plan = call->plan;
  const int64_t I = args->shape.intermediate, H = args->shape.hidden;
  const int64_t size = (int64_t)wd_dtype_size(args->shape.dtype);
  const int parts = wd_intermediate_parts(args->shape.dtype), has_up = args->gating.has_up;
  const int32_t expert = plan->expert[item.active], end = plan->begin[item.active + 1];
  float gate_biases[WD_MAX_TILE], up_biases[WD_MAX_TILE];
  const float *const gate_bias = wd_cpu_bias(&args->gate_bias, expert, item.i, item.rows, gate_biases);
  const float *const up_bias = wd_cpu_bias(&args->up_bias, expert, item.i, item.rows, up_biases);

  for (int32_t begin = plan->begin[item.active]; begin < end; begin += WD_MAX_VECTORS) {
    const int32_t count = end - begin < WD_MAX_VECTORS ? end - begin : WD_MAX_VECTORS;
    float gate[WD_MAX_VECTORS][WD_MAX_TILE], up[WD_MAX_VECTORS][WD_MAX_TILE];
    const float *vectors[WD_MAX_VECTORS];
    float *gate_sums[WD_MAX_VECTORS], *up_sums[WD_MAX_VECTORS];
    for (int32_t v = 0; v < count; v++) {
      vectors[v] = plan->vectors + plan->route[begin + v] / args->shape.top_k * wd_lane_count(H);
      gate_sums[v] = gate[v];
      up_sums[v] = up[v];
    }
    dots_of_item(call, item, next, vectors, count, gate_sums, up_sums);
    for (int32_t v = 0; v < count; v++) {
      const int64_t route = plan->route[begin + v];
      char *const part0 = (char *)args->intermediate + (route * parts * I + item.i) * size;
      char *const part1 = parts == 2 ? part0 + I * size : NULL;
      finish(args, route, gate_bias, item.rows, gate[v]);
      if (has_up) finish(args, route, up_bias, item.rows, up[v]);
      call->isa->glu(gate[v], up[v], item.rows, &args->gating);
      call->loops->split(gate[v], item.rows, part0, part1);
    }
  }
}

/* Takes the next item from the counter; rows is 0 when there is none. */
static gate_up_item take_item(gate_up_call *call, int32_t workers) {
  const int64_t I = call->args->shape.intermediate;
  const int64_t tile = wd_cpu_tile(I, call->plan->experts, workers);
  const int64_t tiles = (I + tile - 1) / tile;
  const int64_t index = atomic_fetch_add_explicit(&call->next_item, 1, memory_order_relaxed);
  if (index >= tiles * call->plan->experts) return (gate_up_item){0};
  const int64_t i = index % tiles * tile;
  return (gate_up_item){.active = (int32_t)(index / tiles), .i = i, .rows = I - i < tile ? I - i : tile};
}

static void gate_up_task(void *context, int32_t worker, int32_t workers) {
  gate_up_call *const call = context;
  (void)worker;
  gate_up_item item = take_item(call, workers);
  while (item.rows > 0) {
    const gate_up_item next = take_item(call, workers); /* taken early so that its weights can be prefetched */
    compute_item(call, item, rows_of(call, next.rows > 0 ? next : item, &call->args->gate));
    item = next;
  }
}

void wd_gate_up_cpu(const wd_gate_up_args *args, const wd_cpu_isa *isa, wd_threads *threads) {
  const wd_moe_shape *const shape = &args->shape;
  const wd_cpu_plan plan = wd_cpu_plan_make(shape, args->topk_ids, args->scratch);
  if (plan.experts == 0) return;
  gate_up_call call = {.args = args, .isa = isa, .loops = &isa->loops[shape->dtype], .plan = &plan};
  atomic_init(&call.next_item, 0);
  wd_threads_run(wd_cpu_worthwhile(threads, shape->tokens * shape->hidden), widen_task, &call);
  const int64_t products = plan.routes * (args->gating.has_up ? 2 : 1) * shape->intermediate * shape->hidden;
  wd_threads_run(wd_cpu_worthwhile(threads, products), gate_up_task, &call);
}
