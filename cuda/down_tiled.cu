// down_tiled.cu - moe_down_3d_batched, tiled schedule (tiled.cuh): the arithmetic of down.cu with wgmma.
//
// A route has two columns, the high and the low part of its intermediate. A unit is 128 rows, 32 a warp: half m, row
// low or high (r) of lane group g is hidden value 4g + 2m + r, so a lane ends with four neighbouring values of a route
// and stores 16 bytes of v[t,k,h].
#include "tiled.cuh"

namespace wd {

template <class T> struct Down {
  static constexpr int kParts = 2;
  const wd_down_args &args;
  const void *arranged_columns;

  __device__ __forceinline__ int length() const {
    return args.shape.intermediate;
  }
  __device__ __forceinline__ const T *columns() const {
    return (const T *)arranged_columns;
  }
  __device__ __forceinline__ int column_row(int route, int part) const {
    return 2 * route + part;
  }
  __device__ __forceinline__ const T *weights() const {
    return (const T *)args.down_proj;
  }
  __device__ __forceinline__ int64_t half_stride() const {
    return 2 * (int64_t)args.shape.intermediate;
  }
  __device__ __forceinline__ int64_t high_stride() const {
    return args.shape.intermediate;
  }
  __device__ __forceinline__ int64_t four_groups() const {
    return 16 * (int64_t)args.shape.intermediate;
  }
  __device__ __forceinline__ int hidden(int unit, int warp, int g) const {
    return unit * kUnitRows + warp * 32 + g * 4;
  }
  __device__ __forceinline__ const T *row(int expert, int unit, int warp, int g) const {
    const wd_moe_shape &s = args.shape;
    return weights() + ((int64_t)expert * s.hidden + hidden(unit, warp, g)) * s.intermediate;
  }
  __device__ __forceinline__ bool exists(int unit, int warp, int g) const {
    return hidden(unit, warp, g) < args.shape.hidden; // H is a multiple of 8: all four rows exist, or none
  }
  template <int TILES>
  __device__ __forceinline__ void finish(const float (&c)[2][TILES][4], int unit, int warp, int lane,
                                         const int32_t *routes, int count) const {
    constexpr int LOW = TILES / 2; // the tiles of the low part
    const wd_moe_shape &s = args.shape;
    const int row = hidden(unit, warp, lane / 4);
    if (row >= s.hidden) return;
#pragma unroll
    for (int tile = 0; tile < LOW; tile++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = 8 * tile + lane % 4 * 2 + j;
        if (column >= count) continue;
        auto v = [&](int half, int r) {
          return join_parts<T>(c[half][tile][2 * r + j], c[half][LOW + tile][2 * r + j]);
        };
        *(float4 *)(down_values(args) + (int64_t)routes[column] * s.hidden + row) =
            make_float4(v(0, 0), v(0, 1), v(1, 0), v(1, 1));
      }
  }
};

template <class T, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, 1)
    down_tiled_kernel(const __grid_constant__ wd_down_args args, const __grid_constant__ TiledPlan plan,
                      const void *columns) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  tiled<T, Sizes>(Down<T>{args, columns}, args.shape, plan);
#endif
}

template <class T, class Sizes>
static wd_status down_sizes(const wd_down_args &args, const RouteLists &lists, const void *columns, bool dependent,
                            cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  constexpr size_t bytes = sizeof(TiledShared<Sizes>);
  const TiledPlan plan = {(s.hidden + kUnitRows - 1) / kUnitRows, lists, dependent};
  const dim3 grid = tiled_grid<Sizes>(s, plan.units, Sizes::kColumns / 2);
  return launch_shared<down_tiled_kernel<T, Sizes>>("down_tiled", grid, dim3(Sizes::kThreads), bytes, stream, true,
                                                    args, plan, columns);
}

template <class T>
static wd_status down_dtype(const wd_down_args &args, const RouteLists &lists, const void *columns, bool dependent,
                            cudaStream_t stream) {
  return routes_an_expert(args.shape, kFewRoutes) ? down_sizes<T, FewRoutes>(args, lists, columns, dependent, stream)
                                                  : down_sizes<T, ManyRoutes>(args, lists, columns, dependent, stream);
}

wd_status down_tiled(const wd_down_args &args, const RouteLists &lists, const void *columns, bool dependent,
                     cudaStream_t stream) {
  return args.shape.dtype == WD_BF16 ? down_dtype<bf16>(args, lists, columns, dependent, stream)
                                     : down_dtype<f16>(args, lists, columns, dependent, stream);
}

} // namespace wd
