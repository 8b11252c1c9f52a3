// neurons.cuh - which rows of gate and up a warp of gate_up.cu multiplies, and how their sums become values.
#pragma once
#include "gating.cuh"
#include "kept.cuh"
#include "rows.cuh"

namespace wd {

// One value of the intermediate.
template <class T>
__device__ __forceinline__ void store_parts(const wd_gate_up_args &args, int64_t route, int neuron, float value) {
  const int intermediate = args.shape.intermediate;
  uint16_t *const out = (uint16_t *)args.intermediate + route * 2 * intermediate + neuron;
  Pair<T> parts;
  split_intermediate<T>(value, &parts.value[0], &parts.value[1]);
  const uint64_t policy = policy_for_kept(args.shape);
  store_kept(out, (uint16_t)parts.bits, policy);
  store_kept(out + intermediate, (uint16_t)(parts.bits >> 16), policy);
}
// The same from the finished sums of its gate and, where there is one, its up.
template <class T>
__device__ __forceinline__ void store_value(const wd_gate_up_args &args, int64_t route, int neuron, float gate,
                                            float up) {
  store_parts<T>(args, route, neuron, gated(gate, up, args.gating));
}

// Calls serve(tile, j, route) for this lane's two columns of each tile, as far as there are routes.
template <int TILES, class RouteOf, class Serve>
__device__ __forceinline__ void each_column(int count, RouteOf route_of, Serve serve) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int column = 8 * tile + threadIdx.x % 4 * 2 + j;
      if (column >= count) continue;
      serve(tile, j, (int64_t)route_of(column));
    }
}
__device__ __forceinline__ float weight_of(const wd_gate_up_args &args, int64_t route) {
  return weight_at(args.topk_weights, args.topk_weights_dtype, route);
}

// Weights as rows: a tile of 8 gate rows and their 8 up rows; where there is no up, 16 gate rows.
template <class T, int STEP> struct PlainNeurons {
  using Rows = PlainRows<T, STEP>;
  const wd_gate_up_args &args;
  const bool plain, has_up;        // is_plain()
  const int expert, first, neuron; // the last two: of the warp, of the lane's low row
  const Rows rows;
  float low_bias, high_bias;

  static constexpr int kLeastOfWarp = 8;
  static __host__ __device__ int of_warp(const wd_gate_up_args &args) {
    return args.gating.has_up ? kLeastOfWarp : 16;
  }
  static __device__ __forceinline__ Rows rows_from(const wd_gate_up_args &args, int expert, int first) {
    const wd_matrix &gate = args.gate, &second = args.gating.has_up ? args.up : gate;
    return Rows(rows_of<T>(gate, expert) + first * gate.row_stride,
                rows_of<T>(second, expert) + (args.gating.has_up ? first : first + 8) * second.row_stride,
                gate.row_stride, first >= args.shape.intermediate ? 0 : existing(args, first), args.shape.hidden);
  }
  static __device__ __forceinline__ int existing(const wd_gate_up_args &args, int first) {
    return args.gating.has_up || first + 8 < args.shape.intermediate ? 16 : 8;
  }
  __device__ __forceinline__ PlainNeurons(const wd_gate_up_args &args, bool plain, int expert, int warp)
      : args(args), plain(plain), has_up(args.gating.has_up), expert(expert), first(warp * of_warp(args)),
        neuron(first + threadIdx.x % 32 / 4), rows(rows_from(args, expert, first)) {
  }
  // Once the first rows are on their way: before them every instruction delays the call, at the end nothing would hide
  // the biases' way from memory.
  __device__ __forceinline__ void look_up() {
    if (plain) return;
    low_bias = rows.rows > 0 ? bias_at(args.gate_bias, expert, neuron) : -0.0f;
    high_bias = rows.rows < 16 ? -0.0f
                : has_up       ? bias_at(args.up_bias, expert, neuron)
                               : bias_at(args.gate_bias, expert, neuron + 8);
  }
  template <int TILES, class RouteOf>
  __device__ __forceinline__ void store(const float (&c)[1][1][TILES][4], int count, RouteOf route_of) const {
    if (plain) {
      each_column<TILES>(count, route_of, [&](int tile, int j, int64_t route) {
        store_parts<T>(
            args, route, neuron,
            plain_gated(c[0][0][tile][j], c[0][0][tile][2 + j], args.gating.activation == WD_ACTIVATION_GELU_TANH));
      });
      return;
    }
    each_column<TILES>(count, route_of, [&](int tile, int j, int64_t route) {
      const float weight = weight_of(args, route);
      const float low = finished(c[0][0][tile][j], weight, low_bias);
      const float high = finished(c[0][0][tile][2 + j], weight, high_bias);
      store_value<T>(args, route, neuron, low, high);
      if (!has_up && rows.rows == 16) store_value<T>(args, route, neuron + 8, high, 0.0f);
    });
  }
};

// Transposed weights: TILES tiles, 8 * TILES neurons, twice as many where there is no up. Pieces, of 8 columns of the
// matrix each: gates, then ups; or, where gates and ups alternate, neighbours all.
template <class T, int TILES_OF_ROWS> struct TransposedNeurons {
  static constexpr int M = TILES_OF_ROWS;
  using Rows = TransposedRows<T, M>;
  const wd_gate_up_args &args;
  const int expert, first;
  const Rows rows;

  static constexpr int kLeastOfWarp = 8 * M;
  static __host__ __device__ int of_warp(const wd_gate_up_args &args) {
    return args.gating.has_up ? kLeastOfWarp : 16 * M;
  }
  static __device__ __forceinline__ bool alternate(const wd_gate_up_args &args) {
    return args.gate.row_stride == 2;
  }
  // This lane's piece in line 0, or NULL.
  static __device__ __forceinline__ const T *piece_of(const wd_gate_up_args &args, int expert, int first) {
    const int piece = threadIdx.x % (2 * M);
    if (alternate(args)) // a piece is 4 neurons
      return first + 4 * piece < args.shape.intermediate ? rows_of<T>(args.gate, expert) + 2 * first + 8 * piece
                                                         : nullptr;
    const bool up = args.gating.has_up && piece >= M;
    const int neuron = first + 8 * (up ? piece - M : piece);
    return neuron < args.shape.intermediate ? rows_of<T>(up ? args.up : args.gate, expert) + neuron : nullptr;
  }
  __device__ __forceinline__ TransposedNeurons(const wd_gate_up_args &args, bool, int expert, int warp)
      : args(args), expert(expert), first(warp * of_warp(args)),
        rows(piece_of(args, expert, first), args.gate.k_stride, args.shape.hidden) {
  }
  __device__ __forceinline__ void look_up() {
  }
  __device__ __forceinline__ float gate_bias(int neuron) const {
    return neuron < args.shape.intermediate ? bias_at(args.gate_bias, expert, neuron) : -0.0f;
  }
  __device__ __forceinline__ float up_bias(int neuron) const {
    return neuron < args.shape.intermediate ? bias_at(args.up_bias, expert, neuron) : -0.0f;
  }
  template <int TILES, class RouteOf>
  __device__ __forceinline__ void store(const float (&c)[M][1][TILES][4], int count, RouteOf route_of) const {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
      if (alternate(args)) {
        store_alternating(c[m][0], first + (8 * m + g) / 2, 0, count, route_of);
        store_alternating(c[m][0], first + (8 * (M + m) + g) / 2, 1, count, route_of);
        continue;
      }
      const bool has_up = args.gating.has_up;
      const int low = first + 8 * m + g, high = has_up ? low : first + 8 * (M + m) + g;
      const float low_bias = gate_bias(low), high_bias = has_up ? up_bias(high) : gate_bias(high);
      each_column<TILES>(count, route_of, [&](int tile, int j, int64_t route) {
        const float weight = weight_of(args, route);
        const float one = finished(c[m][0][tile][j], weight, low_bias);
        const float two = finished(c[m][0][tile][2 + j], weight, high_bias);
        if (low < args.shape.intermediate) store_value<T>(args, route, low, one, two);
        if (!has_up && high < args.shape.intermediate) store_value<T>(args, route, high, two, 0.0f);
      });
    }
  }
  // Lane groups 2n and 2n + 1 have a neuron's gate and up, for two columns both: the one takes the first, the other the
  // second. side: of the row, 0 low, 1 high.
  template <int TILES, class RouteOf>
  __device__ __forceinline__ void store_alternating(const float (&c)[TILES][4], int neuron, int side, int count,
                                                    RouteOf route_of) const {
    const bool odd = threadIdx.x / 4 % 2 != 0;
    const float gate_bias = this->gate_bias(neuron), up_bias = this->up_bias(neuron);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const float first_column = c[tile][2 * side], second_column = c[tile][2 * side + 1];
      const float other = __shfl_xor_sync(~0u, odd ? first_column : second_column, 4);
      const int column = 8 * tile + threadIdx.x % 4 * 2 + odd;
      if (column >= count || neuron >= args.shape.intermediate) continue;
      const int64_t route = route_of(column);
      const float weight = weight_of(args, route);
      store_value<T>(args, route, neuron, finished(odd ? other : first_column, weight, gate_bias),
                     finished(odd ? second_column : other, weight, up_bias));
    }
  }
};

template <class Neurons> int warps_of_expert(const wd_gate_up_args &args) {
  return (args.shape.intermediate + Neurons::of_warp(args) - 1) / Neurons::of_warp(args);
}

} // namespace wd
