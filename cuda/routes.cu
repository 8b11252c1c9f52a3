// routes.cu - routes sorted by expert, for calls with many tokens.
//
//   offsets[e] = number of routes whose id is valid and below e;  routes[offsets[e] ..] = routes of e, ascending
//
// One block an expert reads all ids: E * T*K reads from L2, 10 to 40 us at 32768 routes, where the layer takes
// milliseconds. No atomics and no order between blocks, so the lists are the same in every run.
#include "launch.cuh"
#include "routes.cuh"

namespace wd {

__global__ void __launch_bounds__(512)
    sort_routes_kernel(const void *ids, int id_bytes, int routes, int experts, int32_t *offsets, int32_t *lists) {
  __shared__ int32_t below[16], mine[16];
  allow_next_grid(); // it waits for this one before it looks
  const int expert = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int count = 0;
  for (int route = thread; route < routes; route += blockDim.x) {
    const int e = expert_of(ids, id_bytes, route, experts);
    count += e >= 0 && e < expert;
  }
  count = __reduce_add_sync(~0u, count);
  if (lane == 0) below[warp] = count;
  __syncthreads();
  int offset = 0;
  for (int w = 0; w < 16; w++)
    offset += below[w];
  if (thread == 0) offsets[expert] = offset;
  const int found = search_routes(ids, id_bytes, routes, expert, experts, lists + offset, mine);
  if (thread == 0 && expert == experts - 1) offsets[experts] = offset + found;
}

size_t sorted_routes_bytes(const wd_moe_shape &s) {
  return sorted_routes_span(s);
}

RouteLists sorted_routes(const wd_moe_shape &s, const void *scratch) {
  const int32_t *offsets = (const int32_t *)scratch;
  return {offsets, offsets + s.experts + 1};
}

wd_status sort_routes(const wd_moe_shape &s, const void *ids, void *scratch, cudaStream_t stream) {
  int32_t *offsets = (int32_t *)scratch;
  return launch("sort_routes", sort_routes_kernel, dim3(s.experts), dim3(512), 0, stream, false, ids, s.id_bytes,
                (int)(s.tokens * s.top_k), s.experts, offsets, offsets + s.experts + 1);
}

} // namespace wd
