// gate_up_tiled.cuh - moe_gate_up_3d_batched, tiled schedule (tiled.cuh): the arithmetic of gate_up.cu with wgmma.
//
// A unit is 64 neurons, 16 a warp: a lane group has the gate and the up row of one neuron in half 0, of the next in
// half 1, so a lane ends with two neighbouring neurons of a route: a word of one of down's columns. Four lanes have the
// words of 16 bytes, and exchange them: stored word by word, Qwen3-30B-A3B took 608 us at T = 2048 (580 so).
#pragma once
#include "gating.cuh"
#include "kept.cuh"
#include "routes.cuh"
#include "tiled.cuh"

namespace wd {

template <class T, class COLUMNS> struct GateUp {
  using Columns = COLUMNS;
  static constexpr int kParts = 1;
  const wd_gate_up_args &args;
  bool for_down;   // the intermediate becomes down's columns
  int32_t *served; // RouteLists', or NULL: nobody waits
  bool plain;      // is_plain(): worth a path of its own, since no product runs while values are made of sums

  static constexpr bool kGuesses = true;
  __device__ __forceinline__ void tell(const Item &item) const {
    if (!served) return;
    __threadfence();
    atomicAdd(served + item.expert, item.units);
    atomicAdd(served + args.shape.experts, item.units);
  }
  __device__ __forceinline__ int length() const {
    return args.shape.hidden;
  }
  static constexpr int kBoxRows = 64; // gate rows, up rows; or gate rows both
  __device__ __forceinline__ int box(int unit, int i) const {
    return args.gating.has_up ? unit * kBoxRows : unit * kUnitRows + i * kBoxRows;
  }
  // Of lane group g: the first of two neighbouring neurons of a unit. The warp has words w % 2 and w % 2 + 2 of the
  // four pieces of one chunk (columns.cuh); see gather(), and RowReader for the order.
  static __device__ __forceinline__ int neuron(int warp, int g) {
    return warp / 2 * kChunk + g / 2 * 8 + g % 2 * 4 + warp % 2 * 2;
  }
  static __device__ __forceinline__ int row(int warp, int g, int half, int high) {
    return high * kBoxRows + neuron(warp, g) + half;
  }
  // The intermediate of two neighbouring neurons, `row` and the next, for one of the item's columns.
  template <bool PLAIN, int SIDE, int TILES>
  __device__ __forceinline__ void values(Pair<T> *high, Pair<T> *low, const float (&c)[2][TILES][4], int tile, int j,
                                         float weight, const float (&bias)[2][2]) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float gate = c[half][tile][PLAIN ? j : 2 * SIDE + j], up = c[half][tile][2 + j];
      const float value =
          PLAIN ? plain_gated(gate, up, args.gating.activation == WD_ACTIVATION_GELU_TANH)
                : gated(finished(gate, weight, bias[half][0]), finished(up, weight, bias[half][1]), args.gating);
      split_intermediate<T>(value, &high->value[half], &low->value[half]);
    }
  }
  // Four lanes have a word of each of the four pieces of a chunk, for the same four columns (word i of `words`: the
  // high parts of two routes, then the low ones): they exchange them, so that each has one column's, a matrix row.
  static __device__ __forceinline__ uint4 gather(uint32_t (&words)[4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) { // of the piece: lane / 8
      const bool upper = lane & 8 * bit;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (i & bit) continue;
        const uint32_t other = __shfl_xor_sync(~0u, upper ? words[i] : words[i + bit], 8 * bit);
        (upper ? words[i] : words[i + bit]) = other;
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
  // SIDE 0: the neurons of the first box, with their ups; SIDE 1: those of the second, where there are no ups.
  template <bool PLAIN, int SIDE, int TILES>
  __device__ __forceinline__ void store(const float (&c)[2][TILES][4], const Item &item, int row, int first,
                                        const int32_t *routes) const {
    const wd_moe_shape &s = args.shape;
    if (row / kChunk >= chunks_of(s.intermediate)) return; // the whole warp
    const bool exists = row < s.intermediate;
    float bias[2][2]; // [half], of gate and up
#pragma unroll
    for (int half = 0; half < 2; half++) {
      bias[half][0] = !PLAIN && exists ? bias_at(args.gate_bias, item.expert, row + half) : -0.0f;
      bias[half][1] = !PLAIN && exists && args.gating.has_up ? bias_at(args.up_bias, item.expert, row + half) : -0.0f;
    }
    const uint64_t policy = policy_for_kept(s);
    if (!for_down) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int column = 8 * tile + first + j;
          if (column >= item.count || !exists) continue;
          const int64_t route = routes[column];
          Pair<T> high, low;
          values<PLAIN, SIDE>(&high, &low, c, tile, j,
                              PLAIN ? 1.0f : weight_at(args.topk_weights, args.topk_weights_dtype, route), bias);
          uint16_t *p = (uint16_t *)args.intermediate + route * 2 * s.intermediate + row;
          store_kept((uint32_t *)p, high.bits, policy);
          store_kept((uint32_t *)(p + s.intermediate), low.bits, policy);
        }
      return;
    }
    const int64_t part = group_bytes(s.intermediate); // bytes
    const int piece = row % kChunk / 8;
    uint8_t *out = (uint8_t *)args.intermediate + (item.group * 2 + piece / 2) * part + place_in_group(row) -
                   piece * 4 + (first + piece % 2) * 16;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (8 * tile >= item.count) break;
      uint32_t words[4]; // zeros behind the last neuron and the last route: they fill a chunk and a group
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = 8 * tile + first + j;
        Pair<T> high, low;
        if (exists && (PLAIN || column < item.count)) // plain, what is not one of the routes is a sum of zeros
          values<PLAIN, SIDE>(&high, &low, c, tile, j,
                              PLAIN ? 1.0f : weight_at(args.topk_weights, args.topk_weights_dtype, routes[column]),
                              bias);
        words[j] = high.bits, words[2 + j] = low.bits;
      }
      store_kept((uint4 *)(out + tile * 2 * part), gather(words), policy);
    }
  }
  template <int TILES>
  __device__ __forceinline__ void finish(const float (&c)[2][TILES][4], const Item &item, int unit, int warp, int lane,
                                         const int32_t *routes) const {
    const int row = box(unit, 0) + neuron(warp, lane / 4), first = lane % 4 * 2; // of the lane's columns
    if (plain) return store<true, 0>(c, item, row, first, routes);
    store<false, 0>(c, item, row, first, routes);
    if (!args.gating.has_up) store<false, 1>(c, item, row + kBoxRows, first, routes);
  }
};

template <class T, class Sizes, class Columns>
__global__ void __launch_bounds__(Sizes::kBoundThreads, 1)
    gate_up_tiled_kernel(const __grid_constant__ wd_gate_up_args args, const __grid_constant__ TiledPlan plan,
                         const __grid_constant__ RowMaps rows, const __grid_constant__ typename Columns::Source columns,
                         bool for_down, int32_t *served, bool plain) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  tiled<T, Sizes>(GateUp<T, Columns>{args, for_down, served, plain}, args.shape, plan, rows, columns);
#endif
}

inline int units_of(const wd_gate_up_args &args) {
  const int neurons = args.gating.has_up ? kUnitRows / 2 : kUnitRows;
  return (args.shape.intermediate + neurons - 1) / neurons;
}

template <class T, class Sizes, class Columns>
wd_status launch_gate_up(const wd_gate_up_args &args, const RouteLists &lists, const typename Columns::Source &columns,
                         wd_cuda_handover *handover, cudaStream_t stream) {
  using Op = GateUp<T, Columns>;
  const wd_moe_shape &s = args.shape;
  const bool has_up = args.gating.has_up;
  const int64_t expert_rows = args.gate.expert_stride / args.gate.row_stride, last = (s.experts - 1) * expert_rows;
  TiledPlan plan = {};
  plan.units = units_of(args);
  plan.expert_rows = (int)expert_rows;
  plan.lists = lists, plan.taken = lists.taken;
  plan.guesses = meets_by_expert(s);
  const bool told = handover && meets_by_expert(s);
  RowMaps row_maps;
  for (int i = 0; i < 2; i++) {
    const wd_matrix &m = i == 1 && has_up ? args.up : args.gate;
    WD_TRY(describe_rows(&row_maps.box[i], (const T *)m.data + m.offset, s.hidden, last + s.intermediate, m.row_stride,
                         Op::kBoxRows));
  }
  dim3 grid;
  WD_TRY(tiled_grid<Sizes>(&grid, &plan, s, Sizes::kColumns));
  if (told) *handover = {plan.units, 1, plan.most};
  return launch_shared<gate_up_tiled_kernel<T, Sizes, Columns>>(
      "gate_up_tiled", grid, dim3(kTiledThreads), sizeof(TiledShared<Sizes>), stream, true, args, plan, row_maps,
      columns, handover != nullptr, told ? lists.served : nullptr, is_plain(args));
}

// Up to so many routes an expert on average FewRoutes serve where columns are tokens: hardly any expert then has more
// than 64, and here a route has one column (OLMoE at T = 256, 32 an expert: 199.9 us, 204.1 with ManyRoutes).
constexpr int kFewColumns = 40;

// Of weights of type T.
template <class T>
wd_status gate_up_tiled_of(const wd_gate_up_args &args, const RouteLists &lists, const void *columns,
                           wd_cuda_handover *handover, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  if (!columns_are_tokens(s)) {
    CUtensorMap map;
    WD_TRY(describe_columns(&map, columns, s.hidden, wd_column_groups(&s), ManyRoutes::kBox));
    return choose_units<ManyRoutes>(s, units_of(args), 1, [&](auto sizes) {
      using Sizes = decltype(sizes);
      return launch_gate_up<T, Sizes, BoxedColumns<Sizes, 1>>(args, lists, map, handover, stream);
    });
  }
  // So many only where all experts together have 2^15 neurons and more: items of one unit would hardly be sooner done.
  if (!routes_an_expert(s, kFewColumns))
    return launch_gate_up<T, ManyRoutes, TokenColumns<ManyRoutes>>(args, lists, columns, handover, stream);
  return choose_units<FewRoutes>(s, units_of(args), 1, [&](auto sizes) {
    using Sizes = decltype(sizes);
    return launch_gate_up<T, Sizes, TokenColumns<Sizes>>(args, lists, columns, handover, stream);
  });
}

} // namespace wd
