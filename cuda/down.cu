// down.cu - moe_down_3d_batched: the second of the two kernels.
//
//   v[t,k,h] = inter[t,k] . w[e,h],  e = topk_ids[t,k];   output[t,h] = sum_k weight[t,k] * v[t,k,h], rounded once
//
// The intermediate comes as a high and a low part of the weights' type, each with a chain of products of its own:
//   v = dot(high) + dot(low) * 2^-S
// and the slots are combined in slot order, one fused multiply-add each, from zero.
// Bytes: H*I*2 per distinct expert.
//
// direct:  down_direct.cu.
// grouped: a block serves rows of one expert for all its routes, 8, 16 or 32 at a time, and writes v[t,k,h] in FP32
//          to scratch (it stays in L2); combine_slots adds them up.
// tiled:   down_tiled.cu, and combine_slots.
// Behind our own gate_up both start early and have their first weights in flight before they wait for the intermediate.
#include "columns.cuh"
#include "device.cuh"
#include "down_rows.cuh"
#include "flags.cuh"
#include "gating.cuh"
#include "grouped.cuh"
#include "kept.cuh"
#include "launch.cuh"
#include "routes.cuh"

namespace wd {

// The block's rows of one expert against 8*TILES routes.
template <class T, class Rows, class Sizes, int TILES, class Wait>
__device__ __forceinline__ void down_routes(const wd_down_args &args, int expert, const int32_t *routes, int count,
                                            uint32_t ring, Wait wait) {
  const wd_moe_shape &s = args.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = (blockIdx.x * Sizes::kWarps + warp) * 16 * Rows::kTiles;
  float c[Rows::kTiles][2][TILES][4];
  block_dot<T, Sizes, TILES, 2, true>(
      c, DownRows<Rows>::of(args, expert, first_row),
      [&](int i, int part) {
        return i < count ? (const T *)args.intermediate + ((int64_t)routes[i] * 2 + part) * s.intermediate : nullptr;
      },
      s.intermediate, ring, wait);
  const uint64_t policy = policy_for_kept(s);
#pragma unroll
  for (int row_tile = 0; row_tile < Rows::kTiles; row_tile++)
#pragma unroll
    for (int high = 0; high < 2; high++) {
      const int row = first_row + row_in_warp<Rows>(row_tile, high);
      if (row >= s.hidden) continue;
      const float bias = bias_at(args.down_bias, expert, row);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int column = 8 * tile + lane % 4 * 2 + j;
          if (column >= count) continue;
          store_kept(
              down_values(args) + (int64_t)routes[column] * s.hidden + row,
              __fadd_rn(join_parts<T>(c[row_tile][0][tile][2 * high + j], c[row_tile][1][tile][2 * high + j]), bias),
              policy);
        }
    }
}

// grid (H / rows of the warps, experts, splits of long lists), block Sizes::kThreads; scratch: v[T*K, H]
template <class T, class Rows, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, 2)
    down_grouped(const __grid_constant__ wd_down_args args, RouteLists lists, bool dependent,
                 const __grid_constant__ Flags flags) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ int32_t counts[kSearchedRoutes / 32];
  int32_t *searched = (int32_t *)(ring + Sizes::template ring_bytes<Rows>(2));
  allow_next_grid();
  const wd_moe_shape &s = args.shape;
  int expert;
  const int32_t *routes;
  const int count =
      serve_routes<Sizes::kThreads>(blockIdx.y, s, args.topk_ids, lists, searched, counts, &routes, &expert);
  const uint32_t shared = shared_address(ring);
  bool waits = dependent;
  const auto wait = [&] {
    if (waits) flags.meet(count);
  };
  for (int first = Sizes::kRoutes * blockIdx.z; first < count; first += Sizes::kRoutes * gridDim.z) {
    const int left = min(Sizes::kRoutes, count - first);
    if (Sizes::kTiles > 2 && left > 16)
      down_routes<T, Rows, Sizes, Sizes::kTiles>(args, expert, routes + first, left, shared, wait);
    else if (Sizes::kTiles > 1 && left > 8)
      down_routes<T, Rows, Sizes, Sizes::kMiddleTiles>(args, expert, routes + first, left, shared, wait);
    else
      down_routes<T, Rows, Sizes, 1>(args, expert, routes + first, left, shared, wait);
    waits = false;
  }
  // One block always waits for it, work or not, so that the end of this grid implies the end of gate_up for whatever
  // follows. The other empty blocks leave at once: waiting, they would keep the SMs from those that have weights to
  // load.
  if (dependent && blockIdx.x == 0 && blockIdx.y == 0) wait_for_previous_grid();
}

template <class T, class Rows, class Sizes>
wd_status launch_grouped(const wd_down_args &args, const RouteLists &lists, bool dependent, const Flags &flags,
                         cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  constexpr int kRows = 16 * Rows::kTiles * Sizes::kWarps;
  // 99 KB: what compute capability 8.6, 8.9 and 12.0 have for a block; `counts` is below 1 KB.
  static_assert(Sizes::template ring_bytes<Rows>(2) + kSearchedRoutes * sizeof(int32_t) + 1024 <= 99 << 10);
  return launch_shared<down_grouped<T, Rows, Sizes>>(
      "down_grouped", dim3((s.hidden + kRows - 1) / kRows, serving_blocks(s), list_splits(s)), dim3(Sizes::kThreads),
      Sizes::template ring_bytes<Rows>(2) + searched_bytes(s), stream, dependent, args, lists, dependent, flags);
}

// The ring as deep as leaves room for two to five blocks an SM of 227 KB.
template <class T>
wd_status launch_some_grouped(const wd_down_args &args, const RouteLists &lists, bool dependent, const Flags &flags,
                              cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  if (args.down.k_stride != 1) {
    using Rows = TransposedRows<T, 4>;
    if (routes_an_expert(s, 2))
      return launch_grouped<T, Rows, GroupedSizes<2, 1, 4>>(args, lists, dependent, flags, stream);
    return launch_grouped<T, Rows, GroupedSizes<2, 2, 4>>(args, lists, dependent, flags, stream);
  }
  using Rows = PlainRows<T, 64>;
  if (routes_an_expert(s, 2)) {
    // Five blocks an SM with two steps of 256 bytes a row each, where they are many and no step is half empty (OLMoE at
    // T = 16: 160.7 us, 161.9 with the others); or, deeper, four with five of 128 (Mixtral-8x7B at T = 4: 489, 507 with
    // the former).
    using Wide = PlainRows<T, 128>;
    double waves;
    WD_TRY(waves_of(&waves, s, (s.hidden + 63) / 64, 5));
    if (waves > 2 && s.intermediate % Wide::kStep == 0)
      return launch_grouped<T, Wide, GroupedSizes<4, 1, 2>>(args, lists, dependent, flags, stream);
    return launch_grouped<T, Rows, GroupedSizes<4, 1, 5>>(args, lists, dependent, flags, stream);
  }
  if (routes_an_expert(s, 12))
    return launch_grouped<T, Rows, GroupedSizes<8, 2, 4>>(args, lists, dependent, flags, stream);
  return launch_grouped<T, Rows, GroupedSizes<8, 4, 4>>(args, lists, dependent, flags, stream);
}

// Whole lines of the workspace that nobody reads any more.
struct Spent {
  const char *first;
  int lines;
};
inline Spent spent_lines(const void *memory, size_t bytes) {
  const uintptr_t first = ((uintptr_t)memory + 127) / 128, end = ((uintptr_t)memory + bytes) / 128;
  return {(const char *)(first * 128), end > first ? (int)(end - first) : 0};
}

constexpr int kCombineThreads = 256, kTogether = 8; // slots whose loads are on their way together

// output[t,h] = sum over slots in slot order; a thread owns four hidden values (H is a multiple of 8).
// grid T * row_blocks
template <class T>
__global__ void __launch_bounds__(kCombineThreads, 4)
    combine_slots(const __grid_constant__ wd_down_args args, unsigned row_blocks, const Spent spent) {
  const wd_moe_shape &s = args.shape;
  const unsigned token = blockIdx.x / row_blocks;
  const int h = (int)(blockIdx.x % row_blocks * kCombineThreads + threadIdx.x) * 4;
  const int64_t first = (int64_t)token * s.top_k;
  const float *values = down_values(args) + first * s.hidden + h;
  const bool inside = h < s.hidden;
  float sum[4] = {};
  for (int base = 0; base < s.top_k; base += kTogether) {
    // A lane looks one slot up, for the whole warp: eight look-ups by each would wait for one another.
    const int own = base + threadIdx.x % kTogether;
    const bool has = own < s.top_k && expert_of(args.topk_ids, s.id_bytes, first + own, s.experts) >= 0;
    const float own_weight = has ? weight_at(args.topk_weights, args.topk_weights_dtype, first + own) : 0.0f;
    const unsigned valid = __ballot_sync(~0u, has);
    if (base == 0) wait_for_previous_grid();
    float4 v[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; i++)
      if (inside && valid >> i & 1) v[i] = __ldcg((const float4 *)(values + (int64_t)(base + i) * s.hidden));
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      const float weight = __shfl_sync(~0u, own_weight, i);
      if (!(valid >> i & 1)) continue;
      sum[0] = __fmaf_rn(weight, v[i].x, sum[0]);
      sum[1] = __fmaf_rn(weight, v[i].y, sum[1]);
      sum[2] = __fmaf_rn(weight, v[i].z, sum[2]);
      sum[3] = __fmaf_rn(weight, v[i].w, sum[3]);
    }
  }
  for (int i = blockIdx.x * kCombineThreads + threadIdx.x; i < spent.lines; i += gridDim.x * kCombineThreads)
    forget(spent.first + 128 * (int64_t)i);
  if (!inside) return;
  Pair<T> out[2];
  out[0].value[0] = Element<T>::round(sum[0]), out[0].value[1] = Element<T>::round(sum[1]);
  out[1].value[0] = Element<T>::round(sum[2]), out[1].value[1] = Element<T>::round(sum[3]);
  *(uint2 *)((T *)args.output + (int64_t)token * s.hidden + h) = make_uint2(out[0].bits, out[1].bits);
  __syncwarp(); // eight lanes have read a line: nobody does any more
  if (threadIdx.x % 8 == 0 && (uintptr_t)values % 128 == 0 && s.hidden % 32 == 0)
    for (int slot = 0; slot < s.top_k; slot++)
      forget(values + (int64_t)slot * s.hidden);
}

template <class T>
wd_status down(const wd_down_args &args, wd_cuda_schedule schedule, const wd_cuda_handover *handover,
               cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  const bool behind_gate_up = handover != nullptr;
  bool early_launch;
  WD_TRY(serves_dependent_launch(&early_launch));
  const bool dependent = behind_gate_up && early_launch;
  if (schedule == WD_CUDA_DIRECT) return down_direct(args, dependent, stream);
  RouteLists lists = {};
  const void *columns = args.intermediate;
  if (schedule == WD_CUDA_TILED || needs_lists(s)) {
    // behind our own gate_up the lists are there: it made them, and let this grid start only then
    const bool gather = schedule == WD_CUDA_TILED && !behind_gate_up; // then behind the scratch is room for columns
    if (gather) columns = (char *)args.scratch + wd_cuda_scratch_bytes(&s);
    if (!behind_gate_up) WD_TRY(sort_routes(s, args.topk_ids, args.scratch, nullptr, nullptr, stream));
    if (gather) WD_TRY(sort_columns(s, args.scratch, args.intermediate, (void *)columns, 2, s.intermediate, stream));
    lists = sorted_routes(s, args.scratch);
  }
  if (schedule == WD_CUDA_TILED)
    WD_TRY(down_tiled(args, lists, columns, dependent ? handover : nullptr, stream));
  else
    WD_TRY(launch_some_grouped<T>(args, lists, dependent, dependent ? handed_over(s, args.scratch, *handover) : Flags{},
                                  stream));
  Spent spent = {};
  if (behind_gate_up)
    spent = spent_lines(args.intermediate, schedule == WD_CUDA_TILED
                                               ? (size_t)wd_column_groups(&s) * 2 * group_bytes(s.intermediate)
                                               : (size_t)s.tokens * s.top_k * 2 * s.intermediate * sizeof(T));
  const unsigned row_blocks = (s.hidden + 4 * kCombineThreads - 1) / (4 * kCombineThreads);
  return launch_shared<combine_slots<T>>("combine_slots", dim3((unsigned)s.tokens * row_blocks), dim3(kCombineThreads),
                                         0, stream, true, args, row_blocks, spent);
}

} // namespace wd

// Lists, then v[T*K, H]; behind it flags (grouped) or columns of gate_up (tiled, where down meets by expert; else they
// lie where v will be).
static size_t scratch_of(wd_moe_shape s, int64_t tokens) {
  s.tokens = tokens;
  const size_t v = wd::down_values_bytes(s), grouped = v + wd::flags_bytes(s), columns = wd::gate_up_columns_bytes(s);
  const size_t tiled = wd::meets_by_expert(s) ? v + columns : v > columns ? v : columns;
  return wd::sorted_routes_span(s) + wd::align16(grouped > tiled ? grouped : tiled);
}
size_t wd_cuda_scratch_bytes(const wd_moe_shape *s) {
  // Fewer tokens may need more, where flags and columns have places of their own, or columns are gathered: a last pass,
  // or a caller's next call, has the room of a longer one.
  size_t most = scratch_of(*s, s->tokens);
  for (const int64_t routes : {wd::kFlaggedRoutes, wd::kGatheredRoutes, wd::kMeetingRoutes}) {
    const int64_t tokens = routes / s->top_k;
    const size_t bytes = tokens < s->tokens ? scratch_of(*s, tokens) : 0;
    if (bytes > most) most = bytes;
  }
  return most;
}

wd_status wd_down_cuda(const wd_down_args *args, wd_cuda_schedule schedule, const wd_cuda_handover *handover,
                       void *stream) {
  wd_down_args own = *args;
  WD_TRY(wd::find_kept(&own.shape));
  return own.shape.dtype == WD_BF16 ? wd::down<wd::bf16>(own, schedule, handover, (cudaStream_t)stream)
                                    : wd::down<wd::f16>(own, schedule, handover, (cudaStream_t)stream);
}
