// gate_up.cu - moe_gate_up_3d_batched: the first of the two kernels.
//
//   inter[t,k,i] = act(x[t] . gate[e,i]) * (x[t] . up[e,i]),  e = topk_ids[t,k],  as a high and a low part
//
// (gating.cuh has the rest of it). A warp owns neurons: 8 in a tile of 16 rows, which are their gate rows and their up
// rows, so gate and up of one neuron and token end in the same lane and the activation needs no exchange; warps never
// meet. Bytes: 2*I*H*2 per distinct expert, read once per block that serves the expert.
//
// direct:  a warp serves one route; nothing is looked up but its id. For few tokens, where experts are hardly shared.
// grouped: a block serves all routes of one expert, 8, 16 or 32 at a time; each expert is read once (per 16 or 32).
// tiled:   gate_up_tiled.cu.
#include "device.cuh"
#include "direct.cuh"
#include "flags.cuh"
#include "grouped.cuh"
#include "launch.cuh"
#include "neurons.cuh"
#include "routes.cuh"

namespace wd {

// Warps of a block, each with neurons of its own. Where a warp reads lines of 64 bytes (transposed weights), four of
// them ask for 256 neighbouring ones (gpt-oss-20b at T = 1: 4% of the layer).
template <class Rows> constexpr int kDirectWarps = Rows::kTiles == 2 ? 4 : 2;

// grid (routes, warps of an expert / kDirectWarps), block 32 * kDirectWarps: routes run side by side, so that those of
// one expert find each other's rows in L2
template <class T, class Neurons, int AHEAD>
__global__ void __launch_bounds__(32 * kDirectWarps<typename Neurons::Rows>)
    gate_up_direct(const __grid_constant__ wd_gate_up_args args, bool plain) {
  using Rows = typename Neurons::Rows;
  extern __shared__ __align__(128) uint8_t rings[];
  wait_for_previous_grid();
  allow_next_grid();
  const wd_moe_shape &s = args.shape;
  const int64_t route = blockIdx.x;
  const int warp = threadIdx.x / 32;
  const int expert = expert_of(args.topk_ids, s.id_bytes, route, s.experts);
  if (expert < 0) return;
  Neurons own(args, plain, expert, blockIdx.y * kDirectWarps<Rows> + warp);
  if (own.first >= s.intermediate) return;
  float c[Rows::kTiles][1][1][4];
  direct_dot<T, 1, AHEAD, false>(c, own.rows, (const T *)args.hidden_states + route / s.top_k * s.hidden, 0, s.hidden,
                                 rings + warp * direct_bytes<Rows, 1, AHEAD>(), [&] { own.look_up(); });
  own.store(c, 1, [&](int) { return route; }); // all columns are the same route: the first is stored
}

// The block's neurons against 8*TILES routes. routes: the list, `count` of it valid (>= 1). begun(): when the first
// copies are on their way.
template <class T, class Neurons, class Sizes, int TILES, class Begun>
__device__ __forceinline__ void gate_up_routes(const wd_gate_up_args &args, bool plain, int expert,
                                               const int32_t *routes, int count, uint32_t ring, Begun begun) {
  const wd_moe_shape &s = args.shape;
  Neurons own(args, plain, expert, blockIdx.x * Sizes::kWarps + threadIdx.x / 32);
  float c[Neurons::Rows::kTiles][1][TILES][4];
  block_dot<T, Sizes, TILES, 1, false>(
      c, own.rows,
      [&](int i, int) {
        return i < count ? (const T *)args.hidden_states + (int64_t)(routes[i] / s.top_k) * s.hidden : nullptr;
      },
      s.hidden, ring, [&] { begun(), own.look_up(); });
  if (own.first < s.intermediate) own.store(c, count, [&](int i) { return (int64_t)routes[i]; });
}

// grid (warps of an expert / warps, experts, splits of long lists), block Sizes::kThreads
template <class T, class Neurons, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, 2)
    gate_up_grouped(const __grid_constant__ wd_gate_up_args args, bool plain, RouteLists lists,
                    const __grid_constant__ Flags flags) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ int32_t counts[kSearchedRoutes / 32];
  int32_t *searched = (int32_t *)(ring + Sizes::template ring_bytes<typename Neurons::Rows>(1));
  wait_for_previous_grid();
  flags.begin();
  int expert;
  const int32_t *routes;
  const int count =
      serve_routes<Sizes::kThreads>(blockIdx.y, args.shape, args.topk_ids, lists, searched, counts, &routes, &expert);
  const uint32_t shared = shared_address(ring);
  bool begins = true;
  const auto begun = [&] {
    if (begins) flags.begun();
    begins = false;
  };
  for (int first = Sizes::kRoutes * blockIdx.z; first < count; first += Sizes::kRoutes * gridDim.z) {
    const int left = min(Sizes::kRoutes, count - first);
    if (Sizes::kTiles > 2 && left > 16)
      gate_up_routes<T, Neurons, Sizes, Sizes::kTiles>(args, plain, expert, routes + first, left, shared, begun);
    else if (Sizes::kTiles > 1 && left > 8)
      gate_up_routes<T, Neurons, Sizes, Sizes::kMiddleTiles>(args, plain, expert, routes + first, left, shared, begun);
    else
      gate_up_routes<T, Neurons, Sizes, 1>(args, plain, expert, routes + first, left, shared, begun);
  }
  if (!begins) flags.served();
}

// Of weights on their way to an SM (choose_ahead): with 150 KB of rows OLMoE took 47.1 us at T = 2 (46.3 so),
// Qwen3.5-35B-A3B 38.9 at 3 (37.0). With 200 KB of transposed weights, which come as more lines, gpt-oss-20b took 100.2
// us at T = 2 (94.6 with 150 KB, in another run).
template <class Rows> constexpr int64_t kDirectOnTheirWay = (Rows::kTiles == 1 ? 200 : 150) << 10;

template <class T, class Neurons> wd_status launch_direct(const wd_gate_up_args &args, cudaStream_t stream) {
  using Rows = typename Neurons::Rows;
  const int64_t routes = args.shape.tokens * args.shape.top_k;
  constexpr int warps = kDirectWarps<Rows>;
  const int blocks = (warps_of_expert<Neurons>(args) + warps - 1) / warps;
  return choose_ahead<Rows, 1>(blocks * routes, warps, kDirectOnTheirWay<Rows>, [&](auto ahead) {
    return launch_shared<gate_up_direct<T, Neurons, ahead>>("gate_up_direct", dim3((unsigned)routes, blocks),
                                                            dim3(32 * warps), warps * direct_bytes<Rows, 1, ahead>(),
                                                            stream, true, args, is_plain(args));
  });
}

template <class T, class Neurons, class Sizes>
wd_status launch_grouped(const wd_gate_up_args &args, const RouteLists &lists, wd_cuda_handover *handover,
                         cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  const int row_blocks = (warps_of_expert<Neurons>(args) + Sizes::kWarps - 1) / Sizes::kWarps;
  static_assert(Sizes::kWarps * Neurons::kLeastOfWarp >= kFlagNeurons, "as flags_bytes() counts");
  Flags flags;
  WD_TRY(flags_for(&flags, s, args.scratch, {row_blocks, (int32_t)list_splits(s), Sizes::kRoutes}, handover));
  return launch_shared<gate_up_grouped<T, Neurons, Sizes>>(
      "gate_up_grouped", dim3(row_blocks, serving_blocks(s), list_splits(s)), dim3(Sizes::kThreads),
      Sizes::template ring_bytes<typename Neurons::Rows>(1) + searched_bytes(s), stream, true, args, is_plain(args),
      lists, flags);
}

// Rings as deep as two to five blocks an SM of 227 KB leave room for; one is shorter where a block has 99 KB.
template <class T>
wd_status launch_some_grouped(const wd_gate_up_args &args, const RouteLists &lists, wd_cuda_handover *handover,
                              cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  if (args.gate.k_stride != 1) {
    using Neurons = TransposedNeurons<T, 4>;
    if (routes_an_expert(s, 2)) return launch_grouped<T, Neurons, GroupedSizes<2, 1, 4>>(args, lists, handover, stream);
    return launch_grouped<T, Neurons, GroupedSizes<2, 2, 4>>(args, lists, handover, stream);
  }
  using Wide = PlainNeurons<T, 128>;
  using Narrow = PlainNeurons<T, 64>;
  if (routes_an_expert(s, 2)) {
    // Five blocks an SM with two steps each, or four with three.
    double five, four;
    const int blocks = (warps_of_expert<Wide>(args) + 3) / 4;
    WD_TRY(waves_of(&five, s, blocks, 5));
    WD_TRY(waves_of(&four, s, blocks, 4));
    if (filled(five) > filled(four) + 0.1)
      return launch_grouped<T, Wide, GroupedSizes<4, 1, 2>>(args, lists, handover, stream);
    return launch_grouped<T, Wide, GroupedSizes<4, 1, 3>>(args, lists, handover, stream);
  }
  if (!routes_an_expert(s, 12)) return launch_grouped<T, Narrow, GroupedSizes<8, 4, 4>>(args, lists, handover, stream);
  // Where not every multiprocessor would have a large block, small ones (E 8, K 3, H 4864, I 336 at T = 8: 39.9 us with
  // large ones, 34.0 so).
  using Large = GroupedSizes<8, 2, 3>;
  int sms;
  WD_TRY(multiprocessors(&sms));
  const int64_t large = (warps_of_expert<Wide>(args) + Large::kWarps - 1) / Large::kWarps * (int64_t)serving_blocks(s);
  if (large < sms) return launch_grouped<T, Wide, GroupedSizes<2, 2, 3>>(args, lists, handover, stream);
  bool deep;
  WD_TRY((has_room<Large, typename Wide::Rows>(&deep, s, 1)));
  if (deep) return launch_grouped<T, Wide, Large>(args, lists, handover, stream);
  return launch_grouped<T, Narrow, GroupedSizes<8, 2, 5>>(args, lists, handover, stream);
}

template <class T>
wd_status gate_up(const wd_gate_up_args &args, wd_cuda_schedule schedule, wd_cuda_handover *handover,
                  cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  if (schedule == WD_CUDA_DIRECT) {
    if (args.gate.k_stride == 1) return launch_direct<T, PlainNeurons<T, 128>>(args, stream);
    bool lines;
    const bool has_up = args.gating.has_up;
    WD_TRY(long_lines(&lines, (has_up ? 2 : 1) * s.intermediate * s.tokens * s.top_k,
                      has_up && args.gate.row_stride == 1));
    return lines ? launch_direct<T, TransposedNeurons<T, 4>>(args, stream)
                 : launch_direct<T, TransposedNeurons<T, 2>>(args, stream);
  }
  RouteLists lists = {};
  if (schedule == WD_CUDA_TILED || needs_lists(s)) {
    const bool tiled = schedule == WD_CUDA_TILED;
    // where v of down will be, or behind it
    void *columns = (char *)args.scratch + sorted_routes_span(s) + (meets_by_expert(s) ? down_values_bytes(s) : 0);
    const bool by_token = tiled && columns_are_tokens(s);
    WD_TRY(sort_routes(s, args.topk_ids, args.scratch, by_token ? args.hidden_states : nullptr, columns, stream));
    if (tiled && !by_token) WD_TRY(sort_columns(s, args.scratch, args.hidden_states, columns, 1, s.hidden, stream));
    lists = sorted_routes(s, args.scratch);
    if (tiled) return gate_up_tiled(args, lists, columns, handover, stream);
  }
  return launch_some_grouped<T>(args, lists, handover, stream);
}

} // namespace wd

wd_status wd_gate_up_cuda(const wd_gate_up_args *args, wd_cuda_schedule schedule, wd_cuda_handover *handover,
                          void *stream) {
  wd_gate_up_args own = *args;
  if (handover) *handover = {};
  WD_TRY(wd::find_kept(&own.shape));
  return own.shape.dtype == WD_BF16 ? wd::gate_up<wd::bf16>(own, schedule, handover, (cudaStream_t)stream)
                                    : wd::gate_up<wd::f16>(own, schedule, handover, (cudaStream_t)stream);
}
