// gate_up.cu - moe_gate_up_3d_batched: the first of the two kernels.
//
//   inter[t,k,i] = act(x[t] . w[e,i]) * (x[t] . w[e,I+i]),  e = topk_ids[t,k],  as a high and a low part
//
// A warp owns 8 neurons: its 16-row tile is 8 gate rows and their 8 up rows, so gate and up of one neuron and token end
// in the same lane and the activation needs no exchange; warps never meet. Bytes: 2*I*H*2 per distinct expert, read
// once per block that serves the expert; activations come from L1 and L2.
//
// direct:  a warp serves one route; nothing is looked up but its id. For few tokens, where experts are hardly shared.
// grouped: a warp serves all routes of one expert, 8, 16 or 32 at a time; each expert is read once (per 32 routes).
#include "activation.cuh"
#include "device.cuh"
#include "direct.cuh"
#include "launch.cuh"
#include "routes.cuh"

namespace wd {

// 8 neurons against 8*TILES routes. routes: the list, `count` of it valid (>= 1).
template <class T, int TILES, int WEIGHTS_AHEAD, int COLUMNS_AHEAD>
__device__ __forceinline__ void gate_up_tile(const wd_gate_up_args &args, const T *expert, int neuron,
                                             const int32_t *routes, int count) {
  const wd_moe_shape &s = args.shape;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T *gate = expert + (int64_t)(neuron + g) * s.hidden + 8 * t;
  const T *up = gate + (int64_t)s.intermediate * s.hidden;
  const T *column[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) { // columns past the list repeat its last route; they are never stored
    const int32_t route = routes[min(8 * tile + g, count - 1)];
    column[tile] = (const T *)args.hidden_states + (int64_t)(route / s.top_k) * s.hidden + 8 * t;
  }
  float c[1][TILES][4];
  stream_dot<T, TILES, 1, WEIGHTS_AHEAD, COLUMNS_AHEAD>(c, gate, up, column, 0, s.hidden, [] {});
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int column_index = 8 * tile + 2 * t + j;
      if (column_index >= count) continue;
      T *out = (T *)args.intermediate + (int64_t)routes[column_index] * 2 * s.intermediate + neuron + g;
      split_intermediate<T>(activate(c[0][tile][j], args.activation), c[0][tile][2 + j], out, out + s.intermediate);
    }
}

constexpr int kDirectWarps = 2, kGroupedWarps = 4; // of a block, each with neurons of its own

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

// grid (I / 32, experts, splits of long lists), block 32 * kGroupedWarps
template <class T>
__global__ void __launch_bounds__(32 * kGroupedWarps, 4) gate_up_grouped(const wd_gate_up_args args, RouteLists lists) {
  __shared__ int32_t searched[kSearchedRoutes], warp_counts[kGroupedWarps];
  allow_next_grid();
  const wd_moe_shape &s = args.shape;
  const int expert = blockIdx.y;
  const int32_t *routes;
  const int count = routes_of(expert, s, args.topk_ids, lists, searched, warp_counts, &routes);
  const int neuron = (blockIdx.x * kGroupedWarps + threadIdx.x / 32) * 8;
  if (neuron >= s.intermediate) return;
  const T *weights = (const T *)args.gate_up_proj + (int64_t)expert * 2 * s.intermediate * s.hidden;
  for (int first = 32 * blockIdx.z; first < count; first += 32 * gridDim.z) {
    const int left = min(32, count - first);
    if (left > 16) {
      gate_up_tile<T, 4, 2, 2>(args, weights, neuron, routes + first, left);
    } else if (left > 8) {
      gate_up_tile<T, 2, 4, 2>(args, weights, neuron, routes + first, left);
    } else {
      gate_up_tile<T, 1, 4, 4>(args, weights, neuron, routes + first, left);
    }
  }
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
    void *columns = (char *)args.scratch + sorted_routes_span(s); // where v of down will be
    WD_TRY(sort_routes(s, args.topk_ids, args.scratch, args.hidden_states, columns,
                       schedule == WD_CUDA_TILED ? s.tokens : 0, s.hidden, stream));
    lists = sorted_routes(s, args.scratch);
    if (schedule == WD_CUDA_TILED) return gate_up_tiled(args, lists, columns, down_follows, stream);
  }
  return launch("gate_up_grouped", gate_up_grouped<T>,
                dim3((tiles + kGroupedWarps - 1) / kGroupedWarps, s.experts, list_splits(s)), dim3(32 * kGroupedWarps),
                0, stream, false, args, lists);
}

} // namespace wd

wd_status wd_gate_up_cuda(const wd_gate_up_args *args, wd_cuda_schedule schedule, int down_follows, void *stream) {
  return args->shape.dtype == WD_BF16 ? wd::gate_up<wd::bf16>(*args, schedule, down_follows != 0, (cudaStream_t)stream)
                                      : wd::gate_up<wd::f16>(*args, schedule, down_follows != 0, (cudaStream_t)stream);
}
