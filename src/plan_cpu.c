/* plan_cpu.c - scratch, routes sorted by expert, and the two rules of the CPU schedule.
 *
 * The sort is a counting sort by expert. It is stable, so the routes of an expert stay in the order of the tokens. One
 * thread does it: at T = 1 that takes a microsecond, and at larger T nothing against reading the weights. */
#include "plan_cpu.h"

#include <string.h>

/* Where the arrays begin, in bytes from the first cache line of the scratch. */
typedef struct {
  size_t expert, begin, cursor, route, vectors, sums, total;
} scratch_layout;

static const size_t cache_line = 64;

static size_t reserve(size_t *total, size_t count, size_t size) {
  const size_t offset = *total;
  *total += (count * size + cache_line - 1) / cache_line * cache_line;
  return offset;
}

static scratch_layout layout_of(const wd_moe_shape *shape) {
  const size_t tokens = (size_t)shape->tokens;
  const size_t routes = tokens * (size_t)shape->top_k;
  const size_t experts = (size_t)shape->experts;
  const size_t gate_up_floats = tokens * (size_t)wd_lane_count(shape->hidden);
  const size_t down_floats = routes * (size_t)wd_lane_count(shape->intermediate);
  scratch_layout layout = {.total = 0};
  layout.expert = reserve(&layout.total, experts, sizeof(int32_t));
  layout.begin = reserve(&layout.total, experts + 1, sizeof(int32_t));
  layout.cursor = reserve(&layout.total, experts, sizeof(int32_t));
  layout.route = reserve(&layout.total, routes, sizeof(int32_t));
  layout.vectors = reserve(&layout.total, gate_up_floats > down_floats ? gate_up_floats : down_floats, sizeof(float));
  layout.sums = reserve(&layout.total, routes * (size_t)shape->hidden, sizeof(float));
  return layout;
}

size_t wd_cpu_scratch_bytes(const wd_moe_shape *shape) {
  return layout_of(shape).total + cache_line; /* the pointer handed over may lie within a line */
}

wd_cpu_plan wd_cpu_plan_make(const wd_moe_shape *shape, const void *topk_ids, void *scratch) {
  const scratch_layout layout = layout_of(shape);
  char *const base = (char *)scratch + (cache_line - (uintptr_t)scratch % cache_line) % cache_line;
  int32_t *const expert = (void *)(base + layout.expert);
  int32_t *const begin = (void *)(base + layout.begin);
  int32_t *const cursor = (void *)(base + layout.cursor);
  int32_t *const route = (void *)(base + layout.route);
  const int64_t routes = shape->tokens * shape->top_k;

  memset(cursor, 0, (size_t)shape->experts * sizeof *cursor);
  for (int64_t r = 0; r < routes; r++) {
    const int32_t e = wd_cpu_expert_of(shape, topk_ids, r);
    if (e >= 0) cursor[e]++;
  }

  int32_t experts = 0;
  begin[0] = 0;
  for (int32_t e = 0; e < shape->experts; e++) {
    const int32_t count = cursor[e];
    cursor[e] = begin[experts];
    if (count > 0) {
      begin[experts + 1] = begin[experts] + count;
      expert[experts++] = e;
    }
  }

  for (int64_t r = 0; r < routes; r++) {
    const int32_t e = wd_cpu_expert_of(shape, topk_ids, r);
    if (e >= 0) route[cursor[e]++] = (int32_t)r;
  }

  return (wd_cpu_plan){
      .routes = begin[experts],
      .experts = experts,
      .expert = expert,
      .begin = begin,
      .route = route,
      .vectors = (void *)(base + layout.vectors),
      .sums = (void *)(base + layout.sums),
  };
}

wd_threads *wd_cpu_worthwhile(wd_threads *threads, int64_t products) {
  /* Waking a sleeping thread takes up to 50 us; a core does some 5000 products of cached weights in a microsecond. */
  return products >= 1 << 18 ? threads : NULL;
}

int64_t wd_cpu_tile(int64_t rows, int64_t items_per_tile, int32_t workers) {
  /* Eight items per worker even out what the workers' speeds differ by; larger tiles mean longer streams of memory. */
  const int64_t tiles_wanted = (8 * (int64_t)workers + items_per_tile - 1) / items_per_tile;
  const int64_t tile = rows / tiles_wanted / WD_ROW_STEP * WD_ROW_STEP;
  return tile < WD_ROW_STEP ? WD_ROW_STEP : tile > WD_MAX_TILE ? WD_MAX_TILE : tile;
}
