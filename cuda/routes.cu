// routes.cu - what the schedules for many tokens prepare: routes sorted by expert, and columns for wgmma.
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

// One chunk of a column, on its way through registers.
struct Chunk {
  uint4 piece[4];
  __device__ __forceinline__ void load(const uint16_t *from, int left, bool valid) {
#pragma unroll
    for (int p = 0; p < 4; p++)
      piece[p] = load_valid(from + 8 * p, valid && 8 * p < left);
  }
  // Its words to four places, `stride` apart.
  __device__ __forceinline__ void store(uint4 *to, int stride, uint64_t policy) const {
    store_kept(to, make_uint4(piece[0].x, piece[1].x, piece[2].x, piece[3].x), policy);
    store_kept(to + stride, make_uint4(piece[0].y, piece[1].y, piece[2].y, piece[3].y), policy);
    store_kept(to + 2 * stride, make_uint4(piece[0].z, piece[1].z, piece[2].z, piece[3].z), policy);
    store_kept(to + 3 * stride, make_uint4(piece[0].w, piece[1].w, piece[2].w, piece[3].w), policy);
  }
};

// ---- lists ----------------------------------------------------------------------------------------------------------

constexpr int kLeastSortThreads = 256, kMostSortThreads = 1024;
constexpr int kRunsAtOnce = 4; // whose ids are on their way together

// Hidden states [T, length], and where they go as columns of tokens (columns.cuh). source == NULL: nowhere.
struct Tokens {
  const void *source;
  void *target;
  int length;
};

// Puts chunk i of all tokens' in order.
__device__ __forceinline__ void order_tokens(const Tokens &tokens, const wd_moe_shape &s, int i) {
  const int chunks = chunks_of(tokens.length), token = i / chunks, begin = (i - token * chunks) * kChunk;
  if (token >= s.tokens) return;
  Chunk chunk;
  chunk.load((const uint16_t *)tokens.source + (int64_t)token * tokens.length + begin, tokens.length - begin, true);
  chunk.store((uint4 *)tokens.target + 4 * (int64_t)i, 1, policy_for_kept(s));
}

// A block for each expert, and those that put tokens in order. Few registers (at most those of two such blocks, where
// an SM has room for as many threads): beside them a block of gate_up begins.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kSortBlocks = 1;
#else
constexpr int kSortBlocks = 2;
#endif
__global__ void __launch_bounds__(kMostSortThreads, kSortBlocks)
    sort_by_expert(const wd_moe_shape s, const void *ids, int32_t *taken, int32_t *served, int32_t *offsets,
                   int32_t *lists, const Tokens tokens) {
  extern __shared__ uint32_t matches[]; // of each run of 32 routes
  __shared__ int32_t below[kMostSortThreads / 32], mine[kMostSortThreads / 32];
  wait_for_previous_grid();
  allow_next_grid(); // not sooner: it asks for weights at once, and waits for this one only before it looks at lists
  if ((int)blockIdx.x >= s.experts) return order_tokens(tokens, s, (blockIdx.x - s.experts) * blockDim.x + threadIdx.x);
  const int expert = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = blockDim.x / 32;
  // A warp owns some runs: it counts, learns what lies before it, and writes, without waiting for the others.
  const int routes = (int)(s.tokens * s.top_k), runs = (routes + 31) / 32, each = (runs + warps - 1) / warps;
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
  for (int w = 0; w < warps; w++)
    offset += below[w], place += w < warp ? mine[w] : 0, count += mine[w];
  if (thread == 0) offsets[expert] = offset, served[expert] = 0;
  if (thread == 0 && expert == s.experts - 1) offsets[s.experts] = offset + count;
  if (thread < 2 && expert == 0) taken[thread] = 0, served[s.experts] = 0;
  if (own == 0) return;
  for (int run = begin; run < end; run++) {
    const unsigned votes = matches[run];
    if (votes >> lane & 1) lists[offset + place + __popc(votes & ((1u << lane) - 1))] = run * 32 + lane;
    place += __popc(votes);
  }
}

// ---- columns, sorted ------------------------------------------------------------------------------------------------

constexpr int kGatherThreads = 256;

// Groups of columns (columns.cuh); a thread moves two chunks at a time, and eight neighbours write whole matrices.
// source: [T, length] with one part, else [T, K, parts, length]. grid (experts, parts of an expert's columns)
__global__ void __launch_bounds__(kGatherThreads, 3)
    gather_columns(const wd_moe_shape s, const RouteLists lists, const void *source, void *columns, int parts,
                   int length) {
  wait_for_previous_grid();
  allow_next_grid();
  const int expert = blockIdx.x, offset = lists.offsets[expert], count = lists.offsets[expert + 1] - offset;
  const int chunks = chunks_of(length), work = parts * chunks, stride = kGatherThreads / kGroup;
  const uint64_t policy = policy_for_kept(s);
  for (int group = blockIdx.y; group * kGroup < count; group += gridDim.y) {
    const int i = group * kGroup + threadIdx.x % kGroup, route = i < count ? lists.routes[offset + i] : -1;
    const int64_t row = parts == 1 ? route / s.top_k : (int64_t)route * parts;
    const uint16_t *from = (const uint16_t *)source + row * length;
    uint8_t *const place = (uint8_t *)columns + (first_group(offset, expert, s) + group) * parts * group_bytes(length);
    uint4 *to = (uint4 *)place + threadIdx.x % kGroup;
    auto load = [&](Chunk &chunk, int item) {
      const int part = item / chunks, begin = item % chunks * kChunk;
      chunk.load(from + part * (int64_t)length + begin, length - begin, route >= 0 && item < work);
    };
    for (int item = threadIdx.x / kGroup; item < work; item += 2 * stride) {
      Chunk one, two;
      load(one, item), load(two, item + stride);
      one.store(to + (int64_t)item * 4 * kGroup, kGroup, policy);
      if (item + stride < work) two.store(to + (int64_t)(item + stride) * 4 * kGroup, kGroup, policy);
    }
  }
}

RouteLists sorted_routes(const wd_moe_shape &s, void *scratch) {
  int32_t *taken = (int32_t *)scratch;
  int32_t *offsets = taken + 2, *served = offsets + s.experts + 1;
  return {offsets, served + s.experts + 1, taken, served};
}

// Many ids on their way at once: a second look at memory comes behind the rows that gate_up has asked for, 4 us later
// (OLMoE took 211.5 us at T = 256 with 256 threads, 208.6 so). But where gate_up's blocks begin beside this grid's,
// which they do when all of those have begun, an SM has at most 1024 threads of it.
static wd_status sort_threads(int *threads, const wd_moe_shape &s, int64_t runs) {
  int resident;
  WD_TRY(multiprocessors(&resident));
  const int64_t wanted = (runs + kRunsAtOnce - 1) / kRunsAtOnce * 32;
  const int64_t room = meets_by_expert(s) ? (int64_t)resident * 1024 / s.experts / 32 * 32 : kMostSortThreads;
  const int64_t most = room < kMostSortThreads ? room : kMostSortThreads, some = wanted < most ? wanted : most;
  *threads = (int)(some > kLeastSortThreads ? some : kLeastSortThreads);
  return WD_OK;
}

wd_status sort_routes(const wd_moe_shape &s, const void *ids, void *scratch, const void *hidden_states, void *columns,
                      cudaStream_t stream) {
  const RouteLists lists = sorted_routes(s, scratch);
  const Tokens tokens = {hidden_states, columns, s.hidden};
  const int64_t runs = (s.tokens * s.top_k + 31) / 32, chunks = hidden_states ? s.tokens * chunks_of(s.hidden) : 0;
  int threads;
  WD_TRY(sort_threads(&threads, s, runs));
  return launch_shared<sort_by_expert>("sort_by_expert", dim3((unsigned)(s.experts + (chunks + threads - 1) / threads)),
                                       dim3(threads), (size_t)runs * sizeof(uint32_t), stream, true, s, ids,
                                       lists.taken, lists.served, (int32_t *)lists.offsets, (int32_t *)lists.routes,
                                       tokens);
}

wd_status sort_columns(const wd_moe_shape &s, void *scratch, const void *source, void *columns, int parts, int length,
                       cudaStream_t stream) {
  const int64_t groups = s.tokens * s.top_k / kGroup / s.experts + 1; // of an expert, drawn evenly
  return launch_shared<gather_columns>(
      "gather_columns", dim3((unsigned)s.experts, (unsigned)(groups < 1024 ? groups : 1024)), dim3(kGatherThreads), 0,
      stream, true, s, sorted_routes(s, scratch), source, columns, parts, length);
}

} // namespace wd
