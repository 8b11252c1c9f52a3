// routes.cuh - which routes go to an expert: a search within the block for decode, sorted lists for many tokens.
#pragma once
#include "common.cuh"

namespace wd {

// Up to this many routes every block finds its expert's routes itself: the search costs less than a kernel that would
// have to end before the first weight is read. Above, sort_routes runs first.
constexpr int kSearchedRoutes = 2048;

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

} // namespace wd
