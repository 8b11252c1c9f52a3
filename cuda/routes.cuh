// routes.cuh - which routes go to an expert: a search within the block for decode, sorted lists for many tokens.
#pragma once
#include "common.cuh"
#include "device.cuh"

namespace wd {

// Up to this many routes every block finds its expert's routes itself: the search costs less than a kernel that would
// have to end before the first weight is read. Above, sort_routes runs first.
constexpr int kSearchedRoutes = 1024;

inline bool needs_lists(const wd_moe_shape &s) {
  return s.tokens * s.top_k > kSearchedRoutes;
}

// Shared memory of a block's own search: a place for each route of the call.
inline size_t searched_bytes(const wd_moe_shape &s) {
  return needs_lists(s) ? 0 : (size_t)(s.tokens * s.top_k) * sizeof(int32_t);
}

// Up to this many routes of a call tiled's down serves an expert as soon as gate_up has (handover, tiled_plan.cuh):
// v[T*K, H] then has a place of its own, which the columns of hidden states do not share. Beyond, what is won is
// little beside the rest, and memory is not.
constexpr int kListedRoutes = 4096;
inline bool meets_by_expert(const wd_moe_shape &s) {
  return s.tokens * s.top_k <= kListedRoutes;
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

// Writes the routes of `expert` to list, in ascending order, and returns their number to every thread. All threads of
// the block call it; list and warp_counts (one int a warp) are in shared memory.
__device__ __forceinline__ int search_routes(const void *ids, int id_bytes, int routes, int expert, int experts,
                                             int32_t *list, int32_t *warp_counts) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = blockDim.x / 32;
  int found = 0;
  for (int base = 0; base < routes; base += blockDim.x) {
    const int route = base + thread;
    const bool mine = route < routes && expert_of(ids, id_bytes, route, experts) == expert;
    const unsigned votes = __ballot_sync(~0u, mine);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int before = found;
    for (int w = 0; w < warps; w++) {
      if (w < warp) before += warp_counts[w];
      found += warp_counts[w];
    }
    if (mine) list[before + __popc(votes & ((1u << lane) - 1))] = route;
    __syncthreads();
  }
  return found;
}

// Blocks serve experts, or where there are fewer routes than experts, routes: the first of its expert serves all of it.
// Blocks of experts without a route would leave soon, too, but keep others from starting that have weights to load.
inline unsigned serving_blocks(const wd_moe_shape &s) {
  const int64_t routes = s.tokens * s.top_k;
  return (unsigned)(routes < s.experts && !needs_lists(s) ? routes : s.experts);
}

// The routes that a block serves, and their expert: the `index`th of serving_blocks(). The routes are in *routes, their
// number is returned: from the sorted lists where there are some, else by a search into `searched`
// (searched_bytes() of shared memory).
__device__ __forceinline__ int serve_routes(int index, const wd_moe_shape &s, const void *ids, const RouteLists &lists,
                                            int32_t *searched, int32_t *warp_counts, const int32_t **routes,
                                            int *expert) {
  *expert = index;
  if (lists.offsets) {
    const int first = __ldcg(lists.offsets + index); // past L1: see prepare() of tiled_plan.cuh
    *routes = lists.routes + first;
    return __ldcg(lists.offsets + index + 1) - first;
  }
  *routes = searched;
  const int count = (int)s.tokens * s.top_k;
  const bool by_route = count < s.experts;
  if (by_route) *expert = expert_of(ids, s.id_bytes, index, s.experts);
  const int found = search_routes(ids, s.id_bytes, count, *expert, s.experts, searched, warp_counts);
  return by_route && (*expert < 0 || searched[0] != index) ? 0 : found;
}

// ---- from gate_up to down, expert by expert
// --------------------------------------------------------------------------
//
// The end of gate_up's grid is some microseconds in which memory has little to do: the last blocks finish, then those
// of down have their columns brought. So grouped's down does not wait for it, but for the blocks that serve its own
// expert. Each has a flag: 0 before it lets the next grid begin, 1 when what it stored can be read. down's blocks
// begin only when all of gate_up's have, so a flag is never one of an earlier call, and nobody waits for a block
// that has not begun.

// Whether gate_up's blocks have flags: where lists are sorted first, a call is long enough not to need them.
inline bool has_flags(const wd_moe_shape &s) {
  return !needs_lists(s);
}
constexpr int kFlagNeurons = 32; // a block serves so many or more
inline size_t flags_bytes(const wd_moe_shape &s) {
  const size_t blocks = (size_t)serving_blocks(s) * list_splits(s);
  return has_flags(s) ? blocks * ((s.intermediate + kFlagNeurons - 1) / kFlagNeurons) * sizeof(int32_t) : 0;
}

// Of gate_up's blocks in the scratch, behind v: [serving block][split][row block].
struct Flags {
  int32_t *first; // or NULL: down waits for the grid's end
  int row_blocks, splits, split_routes;

  // Of this block of gate_up: grid (row blocks, serving blocks, splits).
  __device__ __forceinline__ int32_t *own() const {
    return first + (blockIdx.y * splits + blockIdx.z) * (int64_t)row_blocks + blockIdx.x;
  }
  // By all threads of a block of gate_up, once, first thing in it; once more when its first copies are on their way.
  __device__ __forceinline__ void begin() const {
    if (!first)
      allow_next_grid();
    else if (threadIdx.x == 0)
      store_relaxed(own(), 0);
  }
  __device__ __forceinline__ void begun() const {
    if (!first || threadIdx.x != 0) return;
    __threadfence();
    allow_next_grid();
  }
  // By all threads of a block of gate_up that has served routes.
  __device__ __forceinline__ void served() const {
    if (!first) return;
    __syncthreads();
    if (threadIdx.x == 0) store_release(own(), 1);
  }
  // By all threads of a block of down, whose expert has `count` routes.
  __device__ __forceinline__ void meet(int count) const {
    if (!first) return wait_for_previous_grid();
    const int flags = min(splits, (count + split_routes - 1) / split_routes) * row_blocks;
    const int32_t *const flag = first + blockIdx.y * splits * (int64_t)row_blocks;
    for (int i = threadIdx.x; i < flags; i += blockDim.x)
      while (load_acquire(flag + i) != 1) {
      }
    __syncthreads();
  }
};

inline Flags flags_of(const wd_moe_shape &s, void *scratch, const wd_cuda_handover &handover) {
  char *const flags = (char *)scratch + sorted_routes_span(s) + down_values_bytes(s); // no columns here: not tiled
  return {handover.row_blocks > 0 ? (int32_t *)flags : nullptr, handover.row_blocks, handover.splits,
          handover.split_routes};
}

} // namespace wd
