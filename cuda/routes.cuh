// routes.cuh - which routes go to an expert: a search within the block for decode, sorted lists for many tokens.
#pragma once
#include "columns.cuh"
#include "common.cuh"
#include "device.cuh"

namespace wd {

// Up to this many routes every block finds its expert's routes itself: the search costs less than a kernel that would
// have to end before the first weight is read. Above, sort_routes runs first (searched, Qwen3.5 took 389 us at T = 128,
// with lists 365; 332 and 318 at 64: with a slower search than today's).
constexpr int kSearchedRoutes = 256;

inline bool needs_lists(const wd_moe_shape &s) {
  return s.tokens * s.top_k > kSearchedRoutes;
}

// Shared memory of a block's own search: a place for each route of the call.
inline size_t searched_bytes(const wd_moe_shape &s) {
  return needs_lists(s) ? 0 : (size_t)(s.tokens * s.top_k) * sizeof(int32_t);
}

// Up to this many routes of a call tiled's down serves an expert as soon as gate_up has (TiledPlan::awaited_units):
// v[T*K, H] then has a place of its own, which gate_up's columns do not share; and gate_up guesses where its blocks
// begin (RowBringer::guess). Beyond, what is won is little beside the rest, and memory is not.
constexpr int kMeetingRoutes = 4096;
inline bool meets_by_expert(const wd_moe_shape &s) {
  return s.tokens * s.top_k <= kMeetingRoutes;
}

// Whether columns of tiled's gate_up are tokens (columns.cuh): then nothing is gathered. Gathering took Qwen3-30B-A3B 9
// of 288 us at T = 128 and 16 of 307 at 256, and eight experts (K 1, H 6208, I 544) 4 of 58 us at 64. But with many
// routes an expert tokens come later than rows (Mixtral-8x7B at 256, 64 an expert: 13% longer). So columns are tokens
// up to 24 routes an expert, and up to 48 where there is much to gather, and about two items a block (an item has 128
// neurons, 256 where there is no up), so that memory is what limits. With 32 an expert OLMoE at 256 takes 5% less with
// tokens, Qwen3.5-35B-A3B at 1024 3% less; eight experts (K 4, H 3712, I 688) at 64 5% more.
constexpr int kGatheredRoutes = 1024;
inline bool columns_are_tokens(const wd_moe_shape &s) {
  return routes_an_expert(s, 24) || (routes_an_expert(s, 48) && s.tokens * s.top_k > kGatheredRoutes &&
                                     (int64_t)s.experts * s.intermediate >= 1 << 15);
}
inline size_t gate_up_columns_bytes(const wd_moe_shape &s) {
  return columns_are_tokens(s) ? token_columns_bytes(s) : (size_t)wd_column_groups(&s) * group_bytes(s.hidden);
}

// Bytes of v[T*K, H] of down: a multiple of 32.
inline size_t down_values_bytes(const wd_moe_shape &s) {
  return (size_t)s.tokens * s.top_k * s.hidden * sizeof(float);
}
// Bytes of the sorted routes (RouteLists), and v[T*K, H] of down behind them in the scratch: whole lines of L2.
__host__ __device__ __forceinline__ size_t sorted_routes_span(const wd_moe_shape &s) {
  return ((size_t)(2 + 2 * (s.experts + 1) + s.tokens * s.top_k) * sizeof(int32_t) + 127) / 128 * 128;
}
__device__ __forceinline__ float *down_values(const wd_down_args &args) {
  return (float *)((char *)args.scratch + sorted_routes_span(args.shape));
}

// Blocks serve experts, or where there are fewer routes than experts, routes: the first of its expert serves all of it.
// Blocks of experts without a route would leave soon, too, but keep others from starting that have weights to load.
inline unsigned serving_blocks(const wd_moe_shape &s) {
  const int64_t routes = s.tokens * s.top_k;
  return (unsigned)(routes < s.experts && !needs_lists(s) ? routes : s.experts);
}

// The routes that a block of THREADS serves, and their expert: the `index`th of serving_blocks(). The routes,
// ascending, are in *routes, their number is returned: from the sorted lists where there are some, else by a search
// into `searched` (searched_bytes() of shared memory). All threads call it; counts is in shared memory.
template <int THREADS>
__device__ __forceinline__ int serve_routes(int index, const wd_moe_shape &s, const void *ids, const RouteLists &lists,
                                            int32_t *searched, int32_t (&counts)[kSearchedRoutes / 32],
                                            const int32_t **routes, int *expert) {
  *expert = index;
  if (lists.offsets) {
    const int first = __ldcg(lists.offsets + index); // past L1: see place_items() of tiled_plan.cuh
    *routes = lists.routes + first;
    return __ldcg(lists.offsets + index + 1) - first;
  }
  *routes = searched;
  constexpr int kRounds = kSearchedRoutes / THREADS, kWarps = THREADS / 32;
  static_assert(kSearchedRoutes % THREADS == 0);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, all = (int)s.tokens * s.top_k;
  const bool by_route = all < s.experts;
  // All ids on their way at once: no weight is asked for before they are there. A place behind the last is -2, which no
  // block serves, not even one whose own id is out of range: `searched` has no room for it.
  int asked[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; i++) {
    const int route = i * THREADS + thread;
    asked[i] = route < all ? expert_of(ids, s.id_bytes, route, s.experts) : -2;
  }
  if (by_route) *expert = expert_of(ids, s.id_bytes, index, s.experts);
  unsigned votes[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; i++) {
    votes[i] = __ballot_sync(~0u, asked[i] == *expert);
    if (lane == 0) counts[i * kWarps + warp] = __popc(votes[i]);
  }
  __syncthreads();
  int found = 0;
#pragma unroll
  for (int i = 0; i < kRounds; i++) {
    int before = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      if (w == warp) before = found;
      found += counts[i * kWarps + w];
    }
    if (votes[i] >> lane & 1) searched[before + __popc(votes[i] & ((1u << lane) - 1))] = i * THREADS + thread;
  }
  __syncthreads();
  return by_route && (*expert < 0 || searched[0] != index) ? 0 : found;
}

} // namespace wd
