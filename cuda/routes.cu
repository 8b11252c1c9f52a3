// routes.cu - what the schedules for many tokens prepare: routes sorted by expert, and their columns for wgmma.
//
//   offsets[e] = number of routes whose id is valid and below e;  routes[offsets[e] ..] = routes of e, ascending
//
// An expert's block reads all ids: E * T*K reads from L2, for calls that take hundreds of microseconds. No atomics and
// no order between blocks, so the lists are the same in every run.
#include "columns.cuh"
#include "device.cuh"
#include "kept.cuh"
#include "launch.cuh"
#include "routes.cuh"

namespace wd {

// ---- columns --------------------------------------------------------------------------------------------------------

// Rows as callers have them, and where they go as columns (columns.cuh). source == NULL: nowhere.
struct Gathering {
  const void *source; // [T, length] with one part, else [T, K, parts, length]
  void *target;
  int parts, length;
};

// One chunk of a column, on its way through registers.
struct Chunk {
  uint4 piece[4];
  __device__ __forceinline__ void load(const uint16_t *from, int left, bool valid) {
#pragma unroll
    for (int p = 0; p < 4; p++)
      piece[p] = load_valid(from + 8 * p, valid && 8 * p < left);
  }
  __device__ __forceinline__ void store(uint4 *to, uint64_t policy) const {
    store_kept(to, make_uint4(piece[0].x, piece[1].x, piece[2].x, piece[3].x), policy);
    store_kept(to + kGroup, make_uint4(piece[0].y, piece[1].y, piece[2].y, piece[3].y), policy);
    store_kept(to + 2 * kGroup, make_uint4(piece[0].z, piece[1].z, piece[2].z, piece[3].z), policy);
    store_kept(to + 3 * kGroup, make_uint4(piece[0].w, piece[1].w, piece[2].w, piece[3].w), policy);
  }
};

// The block gathers a group; `route` is that of this thread's column, thread % 8, or -1 for none. A thread moves two
// chunks at a time, and eight neighbours write whole matrices.
__device__ __forceinline__ void gather_group(const Gathering &g, int route, const wd_moe_shape &s, int64_t group) {
  const int chunks = chunks_of(g.length), work = g.parts * chunks, stride = (int)blockDim.x / kGroup;
  const uint64_t policy = policy_for_kept(s);
  const int64_t row = g.parts == 1 ? route / s.top_k : (int64_t)route * g.parts;
  const uint16_t *from = (const uint16_t *)g.source + row * g.length;
  uint4 *to = (uint4 *)((uint8_t *)g.target + group * g.parts * group_bytes(g.length)) + threadIdx.x % kGroup;
  auto load = [&](Chunk &chunk, int item) {
    const int part = item / chunks, begin = item % chunks * kChunk;
    chunk.load(from + part * (int64_t)g.length + begin, g.length - begin, route >= 0 && item < work);
  };
  for (int item = threadIdx.x / kGroup; item < work; item += 2 * stride) {
    Chunk one, two;
    load(one, item), load(two, item + stride);
    one.store(to + (int64_t)item * 4 * kGroup, policy);
    if (item + stride < work) two.store(to + (int64_t)(item + stride) * 4 * kGroup, policy);
  }
}

// ---- lists ----------------------------------------------------------------------------------------------------------

constexpr int kSortThreads = 512, kSortWarps = kSortThreads / 32;
constexpr int kRunsAtOnce = 8; // whose ids are on their way together: all of a warp's, up to 4096 routes
constexpr int kMostRuns = WD_CUDA_MOST_ROUTES / 32; // of 32 routes

// grid (experts, parts of an expert's columns): all list, for themselves, and the first for others, too.
__global__ void __launch_bounds__(kSortThreads)
    sort_by_expert(const wd_moe_shape s, const void *ids, int32_t *taken, int32_t *served, int32_t *offsets,
                   int32_t *lists, const Gathering gathering) {
  __shared__ int32_t below[kSortWarps], mine[kSortWarps], listed[kListedRoutes];
  __shared__ uint32_t matches[kMostRuns]; // of the runs
  allow_next_grid();                      // it waits for this one before it looks
  const int expert = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  // A warp owns some runs: it counts, learns what lies before it, and writes, without waiting for the others.
  const int routes = (int)(s.tokens * s.top_k), runs = (routes + 31) / 32, each = (runs + kSortWarps - 1) / kSortWarps;
  const int begin = warp * each, end = min(begin + each, runs);
  int lower = 0, own = 0;
  for (int first = begin; first < end; first += kRunsAtOnce) {
    int e[kRunsAtOnce];
#pragma unroll
    for (int i = 0; i < kRunsAtOnce; i++) {
      const int route = (first + i) * 32 + lane;
      e[i] = first + i < end && route < routes ? expert_of(ids, s.id_bytes, route, s.experts) : -1;
    }
#pragma unroll
    for (int i = 0; i < kRunsAtOnce; i++) {
      const unsigned votes = __ballot_sync(~0u, e[i] == expert);
      if (lane == 0 && first + i < end) matches[first + i] = votes;
      lower += e[i] >= 0 && e[i] < expert, own += __popc(votes);
    }
  }
  lower = __reduce_add_sync(~0u, lower);
  if (lane == 0) below[warp] = lower, mine[warp] = own;
  __syncthreads();
  int offset = 0, place = 0, count = 0;
  for (int w = 0; w < kSortWarps; w++)
    offset += below[w], place += w < warp ? mine[w] : 0, count += mine[w];
  const bool writes = blockIdx.y == 0;
  if (writes && thread == 0) offsets[expert] = offset, served[expert] = 0;
  if (writes && thread == 0 && expert == s.experts - 1) offsets[s.experts] = offset + count;
  if (writes && thread < 2 && expert == 0) taken[thread] = 0, served[s.experts] = 0;
  if (own != 0)
    for (int run = begin; run < end; run++) {
      const unsigned votes = matches[run];
      const int i = place + __popc(votes & ((1u << lane) - 1));
      if (votes >> lane & 1) {
        if (writes) lists[offset + i] = run * 32 + lane;
        if (gathering.source) listed[i] = run * 32 + lane;
      }
      place += __popc(votes);
    }
  if (!gathering.source) return;
  __syncthreads();
  const int64_t first = first_group(offset, expert, s);
  for (int group = blockIdx.y; group * kGroup < count; group += gridDim.y) {
    const int i = group * kGroup + thread % kGroup;
    gather_group(gathering, i < count ? listed[i] : -1, s, first + group);
  }
}

constexpr int kGatherThreads = 256;

// grid (experts, parts of an expert's columns)
__global__ void __launch_bounds__(kGatherThreads, 4)
    gather_columns(const wd_moe_shape s, RouteLists lists, const Gathering gathering) {
  wait_for_previous_grid();
  allow_next_grid();
  const int expert = blockIdx.x, offset = lists.offsets[expert], count = lists.offsets[expert + 1] - offset;
  const int64_t first = first_group(offset, expert, s);
  for (int group = blockIdx.y; group * kGroup < count; group += gridDim.y) {
    const int i = group * kGroup + threadIdx.x % kGroup;
    gather_group(gathering, i < count ? lists.routes[offset + i] : -1, s, first + group);
  }
}

RouteLists sorted_routes(const wd_moe_shape &s, void *scratch) {
  int32_t *taken = (int32_t *)scratch;
  int32_t *offsets = taken + 2, *served = offsets + s.experts + 1;
  return {offsets, served + s.experts + 1, taken, served};
}

wd_status sort_routes(const wd_moe_shape &s, const void *ids, void *scratch, const void *source, void *target,
                      int parts, int length, cudaStream_t stream) {
  const RouteLists lists = sorted_routes(s, scratch);
  const Gathering gathering = {source, target, parts, length}, later = {};
  const int64_t routes = s.tokens * s.top_k, groups = routes / kGroup / s.experts + 1; // of an expert, drawn evenly
  const bool at_once = source != nullptr && routes <= kListedRoutes;
  int blocks;
  WD_TRY(multiprocessors(&blocks));
  const int64_t fit = 2 * blocks / s.experts, room = fit < 1 ? 1 : fit; // two blocks of these an SM
  const int64_t splits = at_once ? (groups < room ? groups : room) : 1;
  WD_TRY(launch_shared<sort_by_expert>("sort_by_expert", dim3((unsigned)s.experts, (unsigned)splits),
                                       dim3(kSortThreads), 0, stream, false, s, ids, lists.taken, lists.served,
                                       (int32_t *)lists.offsets, (int32_t *)lists.routes, at_once ? gathering : later));
  if (source == nullptr || at_once) return WD_OK;
  return launch_shared<gather_columns>("gather_columns",
                                       dim3((unsigned)s.experts, (unsigned)(groups < 1024 ? groups : 1024)),
                                       dim3(kGatherThreads), 0, stream, true, s, lists, gathering);
}

} // namespace wd
