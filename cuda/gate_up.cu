// gate_up.cu - moe_gate_up_3d_batched: the first of the two kernels.
//
//   inter[t,k,i] = act(x[t] . w[e,i]) * (x[t] . w[e,I+i]),  e = topk_ids[t,k],  as a high and a low part
//
// A warp owns 8 neurons: its 16-row tile is 8 gate rows and their 8 up rows, so gate and up of one neuron and token end
// in the same lane and the activation needs no exchange; warps never meet. Bytes: 2*I*H*2 per distinct expert, read
// once per block that serves the expert.
//
// direct:  a warp serves one route; nothing is looked up but its id. For few tokens, where experts are hardly shared.
// grouped: a block serves all routes of one expert, 8, 16 or 32 at a time; each expert is read once (per 16 or 32).
// tiled:   gate_up_tiled.cu.
#include "activation.cuh"
#include "device.cuh"
#include "direct.cuh"
#include "grouped.cuh"
#include "launch.cuh"
#include "routes.cuh"

namespace wd {

constexpr int kDirectWarps = 2; // of a block, each with neurons of its own

// grid (I / 16, routes), block 32 * kDirectWarps
template <class T, int AHEAD>
__global__ void __launch_bounds__(32 * kDirectWarps) gate_up_direct(const wd_gate_up_args args) {
  extern __shared__ __align__(128) uint8_t rings[];
  allow_next_grid();
  const wd_moe_shape &s = args.shape;
  const int64_t route = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, neuron = (blockIdx.x * kDirectWarps + warp) * 8;
  const int expert = expert_of(args.topk_ids, s.id_bytes, route, s.experts);
  if (expert < 0 || neuron >= s.intermediate) return;
  const T *gate = (const T *)args.gate_up_proj + ((int64_t)expert * 2 * s.intermediate + neuron) * (int64_t)s.hidden;
  const T *column = (const T *)args.hidden_states + route / s.top_k * s.hidden;
  float c[1][1][4];
  direct_dot<T, 1, AHEAD>(c, gate, (int64_t)s.intermediate * s.hidden, true, column, 0, s.hidden,
                          rings + warp * direct_bytes<1, AHEAD>(), [] {});
  if (lane % 4 != 0) return; // all columns are the same route
  T *out = (T *)args.intermediate + route * 2 * s.intermediate + neuron + lane / 4;
  split_intermediate<T>(activate(c[0][0][0], args.activation), c[0][0][2], out, out + s.intermediate);
}

// The block's neurons (8 a warp) against 8*TILES routes. routes: the list, `count` of it valid (>= 1).
template <class T, class Sizes, int TILES>
__device__ __forceinline__ void gate_up_routes(const wd_gate_up_args &args, const T *expert, const int32_t *routes,
                                               int count, uint32_t ring) {
  const wd_moe_shape &s = args.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int neuron = (blockIdx.x * Sizes::kWarps + warp) * 8;
  float c[1][TILES][4];
  block_dot<T, Sizes, TILES, 1>(
      c, expert + (int64_t)neuron * s.hidden, (int64_t)s.intermediate * s.hidden, neuron < s.intermediate ? 16 : 0,
      [&](int i, int) {
        return i < count ? (const T *)args.hidden_states + (int64_t)(routes[i] / s.top_k) * s.hidden : nullptr;
      },
      s.hidden, ring, [] {});
  if (neuron >= s.intermediate) return;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int column = 8 * tile + lane % 4 * 2 + j;
      if (column >= count) continue;
      T *out = (T *)args.intermediate + (int64_t)routes[column] * 2 * s.intermediate + neuron + lane / 4;
      split_intermediate<T>(activate(c[0][tile][j], args.activation), c[0][tile][2 + j], out, out + s.intermediate);
    }
}

// grid (I / (8 * warps), experts, splits of long lists), block Sizes::kThreads
template <class T, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, 2) gate_up_grouped(const wd_gate_up_args args, RouteLists lists) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ int32_t searched[kSearchedRoutes], warp_counts[Sizes::kWarps];
  allow_next_grid();
  const wd_moe_shape &s = args.shape;
  const int expert = blockIdx.y;
  const int32_t *routes;
  const int count = routes_of(expert, s, args.topk_ids, lists, searched, warp_counts, &routes);
  const T *weights = (const T *)args.gate_up_proj + (int64_t)expert * 2 * s.intermediate * s.hidden;
  const uint32_t shared = shared_address(ring);
  for (int first = Sizes::kRoutes * blockIdx.z; first < count; first += Sizes::kRoutes * gridDim.z) {
    const int left = min(Sizes::kRoutes, count - first);
    if (Sizes::kTiles > 2 && left > 16)
      gate_up_routes<T, Sizes, Sizes::kTiles>(args, weights, routes + first, left, shared);
    else if (Sizes::kTiles > 1 && left > 8)
      gate_up_routes<T, Sizes, Sizes::kMiddleTiles>(args, weights, routes + first, left, shared);
    else
      gate_up_routes<T, Sizes, 1>(args, weights, routes + first, left, shared);
  }
}

template <class T, class Sizes>
wd_status launch_grouped(const wd_gate_up_args &args, const RouteLists &lists, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  return launch_shared<gate_up_grouped<T, Sizes>>(
      "gate_up_grouped", dim3((s.intermediate / 8 + Sizes::kWarps - 1) / Sizes::kWarps, s.experts, list_splits(s)),
      dim3(Sizes::kThreads), Sizes::kAhead * Sizes::slot_bytes(1), stream, false, args, lists);
}

template <class T>
wd_status gate_up(const wd_gate_up_args &args, wd_cuda_schedule schedule, bool down_follows, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  const int tiles = s.intermediate / 8;
  if (schedule == WD_CUDA_DIRECT)
    return choose_ahead<1>(
        (tiles + kDirectWarps - 1) / kDirectWarps * s.tokens * s.top_k, kDirectWarps, [&](auto ahead) {
          return launch_shared<gate_up_direct<T, ahead>>(
              "gate_up_direct", dim3((tiles + kDirectWarps - 1) / kDirectWarps, (unsigned)(s.tokens * s.top_k)),
              dim3(32 * kDirectWarps), kDirectWarps * direct_bytes<1, ahead>(), stream, false, args);
        });
  RouteLists lists = {};
  if (schedule == WD_CUDA_TILED || needs_lists(s)) {
    const bool tiled = schedule == WD_CUDA_TILED;
    void *columns = (char *)args.scratch + sorted_routes_span(s); // where v of down will be
    WD_TRY(sort_routes(s, args.topk_ids, args.scratch, tiled ? args.hidden_states : nullptr, columns, 1, s.hidden,
                       stream));
    lists = sorted_routes(s, args.scratch);
    if (tiled) return gate_up_tiled(args, lists, columns, down_follows, stream);
  }
  // the ring as deep as two or three blocks an SM leave room for
  if (routes_an_expert(s, 2)) return launch_grouped<T, GroupedSizes<4, 1, 6>>(args, lists, stream);
  if (routes_an_expert(s, 6)) return launch_grouped<T, GroupedSizes<8, 2, 5>>(args, lists, stream);
  return launch_grouped<T, GroupedSizes<8, 4, 4>>(args, lists, stream);
}

} // namespace wd

wd_status wd_gate_up_cuda(const wd_gate_up_args *args, wd_cuda_schedule schedule, int down_follows, void *stream) {
  return args->shape.dtype == WD_BF16 ? wd::gate_up<wd::bf16>(*args, schedule, down_follows != 0, (cudaStream_t)stream)
                                      : wd::gate_up<wd::f16>(*args, schedule, down_follows != 0, (cudaStream_t)stream);
}
