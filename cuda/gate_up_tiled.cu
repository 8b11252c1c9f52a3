// gate_up_tiled.cu - moe_gate_up_3d_batched, tiled schedule (tiled.cuh): the arithmetic of gate_up.cu with wgmma.
//
// A unit is 64 neurons, 16 a warp: a lane group has the gate and the up row of one neuron in half 0, of the next in
// half 1, so a lane ends with two neighbouring neurons of a route and stores four bytes.
#include "activation.cuh"
#include "tiled.cuh"

namespace wd {

template <class T> struct GateUp {
  static constexpr int kParts = 1;
  const wd_gate_up_args &args;
  bool for_down; // the intermediate becomes down's columns

  __device__ __forceinline__ int length() const {
    return args.shape.hidden;
  }
  static constexpr int kBoxRows = 64; // gate rows, up rows
  __device__ __forceinline__ int box(int expert, int unit, int i) const {
    return (2 * expert + i) * args.shape.intermediate + unit * kBoxRows;
  }
  // Of lane group g: the first of two neighbouring neurons of a unit. Not 2g: see RowReader.
  static __device__ __forceinline__ int neuron(int warp, int g) {
    return warp * 16 + (g & 4) * 2 + (g & 1) * 4 + (g & 2);
  }
  static __device__ __forceinline__ int row(int warp, int g, int half, int high) {
    return high * kBoxRows + neuron(warp, g) + half;
  }
  template <int TILES>
  __device__ __forceinline__ void finish(const float (&c)[2][TILES][4], const Item &item, int unit, int warp, int lane,
                                         const int32_t *routes) const {
    const wd_moe_shape &s = args.shape;
    const int row = unit * kBoxRows + neuron(warp, lane / 4), first = lane % 4 * 2; // of the lane's columns
    const int columns = for_down ? (item.count + kGroup - 1) / kGroup * kGroup : item.count;
    if (row >= (for_down ? chunks_of(s.intermediate) * kChunk : s.intermediate)) return;
    const int64_t part = for_down ? group_bytes(s.intermediate) : (int64_t)s.intermediate * 2; // bytes
    uint8_t *out = (uint8_t *)args.intermediate;
    out += for_down ? item.group * 2 * part + place_in_group(row) + first * 16 : row * 2;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = 8 * tile + first + j;
        if (column >= columns) continue;
        Pair<T> high, low; // zeros behind the last neuron: they fill a chunk
        if (row < s.intermediate) {
#pragma unroll
          for (int half = 0; half < 2; half++)
            split_intermediate<T>(activate(c[half][tile][j], args.activation), c[half][tile][2 + j], &high.value[half],
                                  &low.value[half]);
        }
        uint8_t *p = out + (for_down ? tile * 2 * part + j * 16 : routes[column] * 2 * part);
        *(uint32_t *)p = high.bits;
        *(uint32_t *)(p + part) = low.bits;
      }
  }
};

template <class T, class Sizes>
__global__ void __launch_bounds__(kTiledThreads, 1)
    gate_up_tiled_kernel(const __grid_constant__ wd_gate_up_args args, const __grid_constant__ TiledPlan plan,
                         const __grid_constant__ CUtensorMap rows, const __grid_constant__ CUtensorMap columns,
                         bool for_down) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  tiled<T, Sizes>(GateUp<T>{args, for_down}, args.shape, plan, rows, columns);
#endif
}

template <class T, class Sizes>
static wd_status gate_up_sizes(const wd_gate_up_args &args, const RouteLists &lists, const void *columns,
                               bool down_follows, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  const TiledPlan plan = {(2 * s.intermediate + kUnitRows - 1) / kUnitRows, lists, lists.taken, false};
  CUtensorMap row_map, column_map;
  WD_TRY(describe_rows(&row_map, args.gate_up_proj, s.hidden, 2 * (int64_t)s.experts * s.intermediate, s.hidden,
                       GateUp<T>::kBoxRows));
  WD_TRY(describe_columns(&column_map, columns, s.hidden, wd_column_groups(&s), Sizes::kBox));
  dim3 grid;
  WD_TRY(tiled_grid(&grid, s, plan.units, Sizes::kColumns));
  return launch_shared<gate_up_tiled_kernel<T, Sizes>>("gate_up_tiled", grid, dim3(kTiledThreads),
                                                       sizeof(TiledShared<Sizes>), stream, true, args, plan, row_map,
                                                       column_map, down_follows);
}

template <class T>
static wd_status gate_up_dtype(const wd_gate_up_args &args, const RouteLists &lists, const void *columns,
                               bool down_follows, cudaStream_t stream) {
  return routes_an_expert(args.shape, kFewRoutes)
             ? gate_up_sizes<T, FewRoutes>(args, lists, columns, down_follows, stream)
             : gate_up_sizes<T, ManyRoutes>(args, lists, columns, down_follows, stream);
}

wd_status gate_up_tiled(const wd_gate_up_args &args, const RouteLists &lists, const void *columns, bool down_follows,
                        cudaStream_t stream) {
  return args.shape.dtype == WD_BF16 ? gate_up_dtype<bf16>(args, lists, columns, down_follows, stream)
                                     : gate_up_dtype<f16>(args, lists, columns, down_follows, stream);
}

} // namespace wd
