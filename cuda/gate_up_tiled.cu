// gate_up_tiled.cu - moe_gate_up_3d_batched, tiled schedule (tiled.cuh): the arithmetic of gate_up.cu with wgmma.
//
// A unit is 64 neurons, 16 a warp: in half m, lane group g has the gate and the up row of neuron 2g + m, so a lane ends
// with two neighbouring neurons of a route and stores four bytes.
#include "activation.cuh"
#include "tiled.cuh"

namespace wd {

template <class T> struct GateUp {
  static constexpr int kParts = 1;
  const wd_gate_up_args &args;
  const void *arranged_columns;
  bool arranges; // the intermediate, for down

  __device__ __forceinline__ int length() const {
    return args.shape.hidden;
  }
  __device__ __forceinline__ const T *columns() const {
    return (const T *)arranged_columns;
  }
  __device__ __forceinline__ int column_row(int route, int) const {
    return route / args.shape.top_k;
  }
  __device__ __forceinline__ const T *weights() const {
    return (const T *)args.gate_up_proj;
  }
  __device__ __forceinline__ int64_t half_stride() const {
    return args.shape.hidden;
  }
  __device__ __forceinline__ int64_t high_stride() const {
    return (int64_t)args.shape.intermediate * args.shape.hidden;
  }
  __device__ __forceinline__ int64_t four_groups() const {
    return 8 * (int64_t)args.shape.hidden;
  }
  __device__ __forceinline__ int neuron(int unit, int warp, int g) const {
    return unit * 64 + warp * 16 + g * 2;
  }
  __device__ __forceinline__ const T *row(int expert, int unit, int warp, int g) const {
    const wd_moe_shape &s = args.shape;
    return weights() + ((int64_t)expert * 2 * s.intermediate + neuron(unit, warp, g)) * s.hidden;
  }
  __device__ __forceinline__ bool exists(int unit, int warp, int g) const {
    return neuron(unit, warp, g) < args.shape.intermediate; // I is a multiple of 8: both neurons exist, or neither
  }
  template <int TILES>
  __device__ __forceinline__ void finish(const float (&c)[2][TILES][4], int unit, int warp, int lane,
                                         const int32_t *routes, int count) const {
    const wd_moe_shape &s = args.shape;
    const int row = neuron(unit, warp, lane / 4);
    const int part = arranges ? arranged(s.intermediate) : s.intermediate, place = arranges ? arranged_place(row) : row;
    if (row >= part) return; // between I and part: the zeros that fill an arranged row
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = 8 * tile + lane % 4 * 2 + j;
        if (column >= count) continue;
        T *out = (T *)args.intermediate + (int64_t)routes[column] * 2 * part + place;
        Pair<T> high, low;
        if (row < s.intermediate) {
#pragma unroll
          for (int half = 0; half < 2; half++)
            split_intermediate<T>(activate(c[half][tile][j], args.activation), c[half][tile][2 + j], &high.value[half],
                                  &low.value[half]);
        }
        *(uint32_t *)out = high.bits;
        *(uint32_t *)(out + part) = low.bits;
      }
  }
};

template <class T, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, 1)
    gate_up_tiled_kernel(const __grid_constant__ wd_gate_up_args args, const __grid_constant__ TiledPlan plan,
                         const void *columns, bool arranges) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  tiled<T, Sizes>(GateUp<T>{args, columns, arranges}, args.shape, plan);
#endif
}

template <class T, class Sizes>
static wd_status gate_up_sizes(const wd_gate_up_args &args, const RouteLists &lists, const void *columns,
                               bool down_follows, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  constexpr size_t bytes = sizeof(TiledShared<Sizes>);
  const TiledPlan plan = {(2 * s.intermediate + kUnitRows - 1) / kUnitRows, lists, false};
  const dim3 grid = tiled_grid<Sizes>(s, plan.units, Sizes::kColumns);
  return launch_shared<gate_up_tiled_kernel<T, Sizes>>("gate_up_tiled", grid, dim3(Sizes::kThreads), bytes, stream,
                                                       true, args, plan, columns, down_follows);
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
