/* down_cpu.c - the second operation on the CPU:
 *
 *   v[t,k,h]    = sum_i inter[t,k,i] D[e,h,i] (+ bias),   e = topk_ids[t,k]
 *   output[t,h] = sum_k topk_weights[t,k] v[t,k,h],   one fmaf per valid slot, in slot order, rounded once
 *
 * A work item is a tile of hidden indices h: for every expert its rows of the tile against all its routes, the sums v
 * to scratch, then the combination of all tokens for this tile. So nothing has to wait for another worker, and the
 * weights of an expert come from memory once. Workers take items from a counter. Before that the intermediate is
 * widened to float (part 0 + part 1 * 2^-S, isa.h), once for all items. */
#include "plan_cpu.h"

#include <stdatomic.h>

typedef struct {
  const wd_down_args *args;
  const wd_cpu_isa *isa;
  const wd_isa_loops *loops;
  const wd_cpu_plan *plan;
  atomic_llong next_item;
} down_call;

static void widen_task(void *context, int32_t worker, int32_t workers) {
  const down_call *const call = context;
  const wd_moe_shape *const shape = &call->args->shape;
  const int64_t part_bytes = shape->intermediate * (int64_t)wd_dtype_size(shape->dtype);
  const int parts = wd_intermediate_parts(shape->dtype);
  for (int64_t r = worker; r < call->plan->routes; r += workers) {
    const int64_t route = call->plan->route[r];
    const char *const part0 = (const char *)call->args->intermediate + route * parts * part_bytes;
    call->loops->widen(part0, parts == 2 ? part0 + part_bytes : NULL, shape->intermediate,
                       call->plan->vectors + route * wd_lane_count(shape->intermediate));
  }
}

static const char *rows_of(const down_call *call, int32_t active, int64_t h) {
  return wd_cpu_row_at(&call->args->down, call->args->shape.dtype, call->plan->expert[active], h);
}

/* v[route, h .. h + rows) for all routes; next_h is the tile that this worker will take after this one. */
static void project(const down_call *call, int64_t h, int64_t rows, int64_t next_h) {
  const wd_cpu_plan *const plan = call->plan;
  const int64_t I = call->args->shape.intermediate, H = call->args->shape.hidden;
  for (int32_t active = 0; active < plan->experts; active++) {
    const char *const weights = rows_of(call, active, h);
    const char *const next = active + 1 < plan->experts ? rows_of(call, active + 1, h) : rows_of(call, 0, next_h);
    const int32_t end = plan->begin[active + 1];
    float biases[WD_MAX_TILE];
    const float *const bias = wd_cpu_bias(&call->args->down_bias, plan->expert[active], h, rows, biases);
    for (int32_t begin = plan->begin[active]; begin < end; begin += WD_MAX_VECTORS) {
      const int32_t count = end - begin < WD_MAX_VECTORS ? end - begin : WD_MAX_VECTORS;
      const float *vectors[WD_MAX_VECTORS];
      float *sums[WD_MAX_VECTORS];
      for (int32_t v = 0; v < count; v++) {
        const int64_t route = plan->route[begin + v];
        vectors[v] = plan->vectors + route * wd_lane_count(I);
        sums[v] = plan->sums + route * H + h;
      }
      wd_cpu_dots(call->loops, &call->args->down, weights, next, rows, I, vectors, count, sums);
      for (int32_t v = 0; v < count; v++)
        wd_cpu_add_bias(sums[v], bias, rows);
    }
  }
}

static float weight_of(const wd_down_args *args, int64_t route) {
  return args->topk_weights == NULL ? 1.0f : wd_cpu_float_at(args->topk_weights, args->topk_weights_dtype, route);
}

/* output[t, h .. h + rows) for all tokens. */
static void combine(const down_call *call, int64_t h, int64_t rows) {
  const wd_moe_shape *const shape = &call->args->shape;
  for (int64_t token = 0; token < shape->tokens; token++) {
    float sum[WD_MAX_TILE] = {0};
    for (int64_t route = token * shape->top_k; route < (token + 1) * shape->top_k; route++)
      if (wd_cpu_expert_of(shape, call->args->topk_ids, route) >= 0)
        call->isa->add_scaled(weight_of(call->args, route), call->plan->sums + route * shape->hidden + h, rows, sum);
    call->loops->narrow(
        sum, rows, (char *)call->args->output + (token * shape->hidden + h) * (int64_t)wd_dtype_size(shape->dtype));
  }
}

static void down_task(void *context, int32_t worker, int32_t workers) {
  down_call *const call = context;
  (void)worker;
  const int64_t H = call->args->shape.hidden;
  const int64_t tile = wd_cpu_tile(H, 1, workers);
  int64_t h = tile * atomic_fetch_add_explicit(&call->next_item, 1, memory_order_relaxed);
  while (h < H) {
    /* Taken early so that its weights can be prefetched. */
    const int64_t next_h = tile * atomic_fetch_add_explicit(&call->next_item, 1, memory_order_relaxed);
    const int64_t rows = H - h < tile ? H - h : tile;
    project(call, h, rows, next_h < H ? next_h : h);
    combine(call, h, rows);
    h = next_h;
  }
}

void wd_down_cpu(const wd_down_args *args, const wd_cpu_isa *isa, wd_threads *threads) {
  const wd_moe_shape *const shape = &args->shape;
  const wd_cpu_plan plan = wd_cpu_plan_make(shape, args->topk_ids, args->scratch);
  down_call call = {.args = args, .isa = isa, .loops = &isa->loops[shape->dtype], .plan = &plan};
  atomic_init(&call.next_item, 0);
  wd_threads_run(wd_cpu_worthwhile(threads, plan.routes * shape->intermediate), widen_task, &call);
  const int64_t products = plan.routes * shape->hidden * shape->intermediate;
  wd_threads_run(wd_cpu_worthwhile(threads, products), down_task, &call);
}
