// routes.cu - what the schedules for many tokens prepare: routes sorted by expert, rows arranged for wgmma.
//
//   offsets[e] = number of routes whose id is valid and below e;  routes[offsets[e] ..] = routes of e, ascending
//
// One block an expert reads all ids: E * T*K reads from L2, for calls that take hundreds of microseconds. No atomics
// and no order between blocks, so the lists are the same in every run.
#include "arrange.cuh"
#include "launch.cuh"
#include "routes.cuh"

namespace wd {

constexpr int kPrepareThreads = 512;

// Rows of `length` 2-byte values, and where they go arranged. rows == 0: none.
struct Arrangement {
  const void *source;
  void *target;
  int64_t rows;
  int length;
};

__device__ __forceinline__ void arrange_chunk(const Arrangement &a, int64_t index) {
  const int chunks = chunks_of(a.length), chunk = (int)(index % chunks);
  const int64_t row = index / chunks;
  if (row >= a.rows) return;
  const uint16_t *source = (const uint16_t *)a.source + row * a.length + chunk * kChunk;
  uint4 piece[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    piece[i] = load_valid(source + 8 * i, chunk * kChunk + 8 * i < a.length);
  uint4 *target = (uint4 *)a.target + index * 4;
  target[0] = make_uint4(piece[0].x, piece[1].x, piece[2].x, piece[3].x);
  target[1] = make_uint4(piece[0].y, piece[1].y, piece[2].y, piece[3].y);
  target[2] = make_uint4(piece[0].z, piece[1].z, piece[2].z, piece[3].z);
  target[3] = make_uint4(piece[0].w, piece[1].w, piece[2].w, piece[3].w);
}

// The first `experts` blocks sort, the others arrange.
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_routes(const void *ids, int id_bytes, int routes, int experts, int32_t *offsets, int32_t *lists,
                   const Arrangement arrangement) {
  __shared__ int32_t below[kPrepareThreads / 32], mine[kPrepareThreads / 32];
  allow_next_grid(); // it waits for this one before it looks
  const int expert = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (expert >= experts) {
    arrange_chunk(arrangement, (int64_t)(expert - experts) * kPrepareThreads + thread);
    return;
  }
  // A warp owns a run of the ids: it counts, learns what lies before it, and writes, without waiting for the others.
  const int each = (routes + kPrepareThreads - 1) / kPrepareThreads * 32, begin = warp * each;
  const int end = min(begin + each, routes);
  int lower = 0, own = 0;
#pragma unroll 8
  for (int route = begin + lane; route < end; route += 32) {
    const int e = expert_of(ids, id_bytes, route, experts);
    lower += e >= 0 && e < expert, own += e == expert;
  }
  lower = __reduce_add_sync(~0u, lower), own = __reduce_add_sync(~0u, own);
  if (lane == 0) below[warp] = lower, mine[warp] = own;
  __syncthreads();
  int offset = 0, place = 0, found = 0;
  for (int w = 0; w < kPrepareThreads / 32; w++)
    offset += below[w], place += w < warp ? mine[w] : 0, found += mine[w];
  if (thread == 0) offsets[expert] = offset;
  if (thread == 0 && expert == experts - 1) offsets[experts] = offset + found;
  place += offset;
  if (own == 0) return;
#pragma unroll 8
  for (int base = begin; base < end; base += 32) {
    const bool match = base + lane < end && expert_of(ids, id_bytes, base + lane, experts) == expert;
    const unsigned votes = __ballot_sync(~0u, match);
    if (match) lists[place + __popc(votes & ((1u << lane) - 1))] = base + lane;
    place += __popc(votes);
  }
}

RouteLists sorted_routes(const wd_moe_shape &s, const void *scratch) {
  const int32_t *offsets = (const int32_t *)scratch;
  return {offsets, offsets + s.experts + 1};
}

wd_status sort_routes(const wd_moe_shape &s, const void *ids, void *scratch, const void *rows, void *target,
                      int64_t row_count, int length, cudaStream_t stream) {
  int32_t *offsets = (int32_t *)scratch;
  const Arrangement arrangement = {rows, target, row_count, length};
  const int64_t chunks = row_count * chunks_of(length);
  const unsigned blocks = (unsigned)(s.experts + (chunks + kPrepareThreads - 1) / kPrepareThreads);
  return launch("prepare_routes", prepare_routes, dim3(blocks), dim3(kPrepareThreads), 0, stream, false, ids,
                s.id_bytes, (int)(s.tokens * s.top_k), s.experts, offsets, offsets + s.experts + 1, arrangement);
}

} // namespace wd
