// gate_up.cu - moe_gate_up_3d_batched: the first of the two kernels.
//
//   inter[t,k,i] = act(x[t] . w[e,i]) * (x[t] . w[e,I+i]),  e = topk_ids[t,k],  as a high and a low part
//
// A warp owns 8 neurons: its 16-row tile is 8 gate rows and their 8 up rows, so gate and up of one neuron and token end
// in the same lane and the activation needs no exchange. Four warps share a tile, one quarter of H each (short chains
// of products, many loads in flight), and meet once in shared memory. Bytes: 2*I*H*2 per distinct expert, read once per
// block that serves the expert; activations come from L1 and L2.
//
// direct:  a block serves one route; nothing is looked up but its id. For few tokens, where experts are hardly shared.
// grouped: a block serves all routes of one expert, 8, 16 or 32 at a time; each expert is read once (per 32 routes).
#include "activation.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "routes.cuh"

namespace wd {

// One tile against 8*TILES routes: dot products of this warp's quarter, sum of the quarters, activation, store.
// partial: this tile's kQuarters * TILES * 32 float4 of shared memory. routes: the list, `count` of it valid (>= 1).
// All warps of the block call it together.
template <class T, int TILES, int WEIGHTS_AHEAD, int COLUMNS_AHEAD>
__device__ __forceinline__ void gate_up_tile(const wd_gate_up_args &args, const T *expert, int neuron,
                                             const int32_t *routes, int count, float4 *partial) {
  const wd_moe_shape &s = args.shape;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, quarter = threadIdx.x / 32 % kQuarters;
  const bool exists = neuron < s.intermediate;
  const int row = (exists ? neuron : 0) + g;
  const T *gate = expert + (int64_t)row * s.hidden + 8 * t;
  const T *up = expert + (int64_t)(s.intermediate + row) * s.hidden + 8 * t;
  const T *column[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) { // columns past the list repeat its last route; they are never stored
    const int32_t route = routes[min(8 * tile + g, count - 1)];
    column[tile] = (const T *)args.hidden_states + (int64_t)(route / s.top_k) * s.hidden + 8 * t;
  }
  float c[1][TILES][4];
  stream_dot<T, TILES, 1, 1, WEIGHTS_AHEAD, COLUMNS_AHEAD>(c, gate, up, column, 0, s.hidden, quarter, [] {});
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
    partial[(quarter * TILES + tile) * 32 + lane] =
        make_float4(c[0][tile][0], c[0][tile][1], c[0][tile][2], c[0][tile][3]);
  __syncthreads();
  // warp q finishes tiles q, q + 4, ...
  for (int tile = quarter; tile < TILES; tile += kQuarters) {
    float4 q[kQuarters];
#pragma unroll
    for (int i = 0; i < kQuarters; i++)
      q[i] = partial[(i * TILES + tile) * 32 + lane];
    const float gates[2] = {add_quarters(q[0].x, q[1].x, q[2].x, q[3].x), add_quarters(q[0].y, q[1].y, q[2].y, q[3].y)};
    const float ups[2] = {add_quarters(q[0].z, q[1].z, q[2].z, q[3].z), add_quarters(q[0].w, q[1].w, q[2].w, q[3].w)};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int column_index = 8 * tile + 2 * t + j;
      if (!exists || column_index >= count) continue;
      T *out = (T *)args.intermediate + (int64_t)routes[column_index] * 2 * s.intermediate + neuron + g;
      const float value = __fmul_rn(activate(gates[j], args.activation), ups[j]);
      const T high = Element<T>::round(value);
      const float rest = __fsub_rn(value, Element<T>::widen(high));
      out[0] = high; // an overflow has no remainder: inf - inf would be NaN
      out[s.intermediate] = Element<T>::round(isfinite(rest) ? rest * Element<T>::kLowScale : 0.0f);
    }
  }
}

// grid (row blocks, routes), block 32 * kQuarters * tiles a block
template <class T> __global__ void __launch_bounds__(256) gate_up_direct(const wd_gate_up_args args) {
  __shared__ float4 partial[2 * kQuarters * 32];
  allow_next_grid();
  const wd_moe_shape &s = args.shape;
  const int32_t route = blockIdx.y;
  const int expert = expert_of(args.topk_ids, s.id_bytes, route, s.experts);
  if (expert < 0) return;
  const int tile = threadIdx.x / 32 / kQuarters, tiles = blockDim.x / 32 / kQuarters;
  const T *weights = (const T *)args.gate_up_proj + (int64_t)expert * 2 * s.intermediate * s.hidden;
  gate_up_tile<T, 1, 4, 4>(args, weights, (int)(blockIdx.x * tiles + tile) * 8, &route, 1,
                           partial + tile * kQuarters * 32);
}

// grid (row blocks, experts, splits of long lists)
template <class T>
__global__ void __launch_bounds__(256, 2) gate_up_grouped(const wd_gate_up_args args, RouteLists lists) {
  __shared__ float4 partial[2 * kQuarters * 4 * 32];
  __shared__ int32_t searched[kSearchedRoutes], warp_counts[8];
  allow_next_grid();
  const wd_moe_shape &s = args.shape;
  const int expert = blockIdx.y;
  const int32_t *routes;
  const int count = routes_of(expert, s, args.topk_ids, lists, searched, warp_counts, &routes);
  const int tile = threadIdx.x / 32 / kQuarters, tiles = blockDim.x / 32 / kQuarters;
  const int neuron = (int)(blockIdx.x * tiles + tile) * 8;
  const T *weights = (const T *)args.gate_up_proj + (int64_t)expert * 2 * s.intermediate * s.hidden;
  float4 *mine = partial + tile * kQuarters * 4 * 32;
  for (int first = 32 * blockIdx.z; first < count; first += 32 * gridDim.z) {
    const int left = min(32, count - first);
    if (left > 16) {
      gate_up_tile<T, 4, 2, 2>(args, weights, neuron, routes + first, left, mine);
    } else if (left > 8) {
      gate_up_tile<T, 2, 4, 2>(args, weights, neuron, routes + first, left, mine);
    } else {
      gate_up_tile<T, 1, 4, 4>(args, weights, neuron, routes + first, left, mine);
    }
    __syncthreads(); // partial is written again
  }
}

template <class T> wd_status gate_up(const wd_gate_up_args &args, wd_cuda_schedule schedule, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  // Two tiles share the tokens' values in L1, which pays as soon as an expert has several tokens (T = 64: 218 -> 207
  // us, T = 256: 362 -> 304); small blocks balance better before that (T = 8: 82.6 -> 80.8).
  const int tiles = schedule == WD_CUDA_GROUPED && s.tokens * s.top_k >= 2 * s.experts ? 2 : 1;
  const int row_blocks = (s.intermediate / 8 + tiles - 1) / tiles;
  if (schedule == WD_CUDA_DIRECT)
    return launch("gate_up_direct", gate_up_direct<T>, dim3(row_blocks, (unsigned)(s.tokens * s.top_k)),
                  dim3(32 * kQuarters * tiles), 0, stream, false, args);
  RouteLists lists;
  WD_TRY(sort_routes(s, args.topk_ids, args.scratch, stream, &lists));
  return launch("gate_up_grouped", gate_up_grouped<T>, dim3(row_blocks, s.experts, list_splits(s)),
                dim3(32 * kQuarters * tiles), 0, stream, false, args, lists);
}

} // namespace wd

wd_status wd_gate_up_cuda(const wd_gate_up_args *args, wd_cuda_schedule schedule, void *stream) {
  return args->shape.dtype == WD_BF16 ? wd::gate_up<wd::bf16>(*args, schedule, (cudaStream_t)stream)
                                      : wd::gate_up<wd::f16>(*args, schedule, (cudaStream_t)stream);
}
