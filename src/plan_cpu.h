/* plan_cpu.h - what both CPU drivers need before they compute: their scratch, cut up, and the routes sorted by expert.
 */
#ifndef WD_PLAN_CPU_H
#define WD_PLAN_CPU_H

#include "isa.h"

typedef struct {
  int64_t routes;        /* number of valid routes: those whose id is in [0, E) */
  int32_t experts;       /* number of distinct experts among them */
  const int32_t *expert; /* [experts] their ids, ascending */
  const int32_t *begin;  /* [experts + 1] the routes of expert[a] are route[begin[a] .. begin[a + 1]) */
  const int32_t *route;  /* [routes] token * K + slot, ascending within an expert */
  float *vectors;        /* [T, wd_lane_count(H)] or [T * K, wd_lane_count(I)]: activations as isa.h wants them */
  float *sums;           /* [T * K, H]: down alone */
} wd_cpu_plan;

/* Sorts the routes of a call into its scratch. */
wd_cpu_plan wd_cpu_plan_make(const wd_moe_shape *shape, const void *topk_ids, void *scratch);

/* topk_ids[route], or -1 if it is outside [0, E). */
static inline int32_t wd_cpu_expert_of(const wd_moe_shape *shape, const void *topk_ids, int64_t route) {
  const int64_t id =
      shape->id_bytes == 8 ? ((const int64_t *)topk_ids)[route] : (int64_t)((const int32_t *)topk_ids)[route];
  return id >= 0 && id < shape->experts ? (int32_t)id : -1;
}

/* `threads`, or NULL where the work is too small to be shared: `products` multiplications of a weight. */
wd_threads *wd_cpu_worthwhile(wd_threads *threads, int64_t products);

/* How many of `rows` weight rows one work item takes, when every tile of rows makes `items_per_tile` items: a multiple
 * of WD_ROW_STEP, at most WD_MAX_TILE. It does not touch the bits. */
enum { WD_MAX_TILE = 64 };
int64_t wd_cpu_tile(int64_t rows, int64_t items_per_tile, int32_t workers);

#endif /* WD_PLAN_CPU_H */
