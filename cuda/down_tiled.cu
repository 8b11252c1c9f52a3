// down_tiled.cu - moe_down_3d_batched, tiled schedule (tiled.cuh): the arithmetic of down.cu with wgmma.
//
// A route has two columns, the high and the low part of its intermediate. A unit is 128 rows, 32 a warp: half m, row
// low or high (r) of lane group g is hidden value 4g + 2m + r, so a lane ends with four neighbouring values of a route
// and stores 16 bytes of v[t,k,h].
#include "gating.cuh"
#include "kept.cuh"
#include "routes.cuh"
#include "tiled.cuh"

namespace wd {

template <class T, class Sizes> struct Down {
  static constexpr int kParts = 2;
  static constexpr bool kGuesses = false;
  using Columns = BoxedColumns<Sizes, kParts>;
  __device__ __forceinline__ void tell(const Item &) const {
  }
  const wd_down_args &args;

  __device__ __forceinline__ int length() const {
    return args.shape.intermediate;
  }
  static constexpr int kBoxRows = kUnitRows;
  __device__ __forceinline__ int box(int unit, int) const {
    return unit * kUnitRows;
  }
  static __device__ __forceinline__ int row(int warp, int g, int half, int high) {
    return warp * 32 + g * 4 + half * 2 + high;
  }
  template <int TILES>
  __device__ __forceinline__ void finish(const float (&c)[2][TILES][4], const Item &item, int unit, int warp, int lane,
                                         const int32_t *routes) const {
    const wd_moe_shape &s = args.shape;
    const int row = unit * kUnitRows + warp * 32 + lane / 4 * 4;
    if (row >= s.hidden) return;
    const uint64_t policy = policy_for_kept(s);
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      bias[i] = bias_at(args.down_bias, item.expert, row + i);
#pragma unroll
    for (int tile = 0; tile < TILES; tile += 2)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int i = 4 * tile + lane % 4 * 2 + j;
        if (i >= item.count) continue;
        auto v = [&](int half, int r) {
          return __fadd_rn(join_parts<T>(c[half][tile][2 * r + j], c[half][tile + 1][2 * r + j]), bias[2 * half + r]);
        };
        store_kept((float4 *)(down_values(args) + (int64_t)routes[i] * s.hidden + row),
                   make_float4(v(0, 0), v(0, 1), v(1, 0), v(1, 1)), policy);
      }
  }
};

template <class T, class Sizes>
__global__ void __launch_bounds__(Sizes::kBoundThreads, 1)
    down_tiled_kernel(const __grid_constant__ wd_down_args args, const __grid_constant__ TiledPlan plan,
                      const __grid_constant__ RowMaps rows, const __grid_constant__ CUtensorMap columns) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  tiled<T, Sizes>(Down<T, Sizes>{args}, args.shape, plan, rows, columns);
#endif
}

static int units_of(const wd_moe_shape &s) {
  return (s.hidden + kUnitRows - 1) / kUnitRows;
}

template <class T, class Sizes>
static wd_status down_sizes(const wd_down_args &args, const RouteLists &lists, const void *columns,
                            const wd_cuda_handover *handover, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  const wd_matrix &m = args.down;
  const int64_t expert_rows = m.expert_stride / m.row_stride;
  TiledPlan plan = {};
  plan.units = units_of(s);
  plan.expert_rows = (int)expert_rows;
  plan.lists = lists, plan.taken = lists.taken + 1;
  plan.dependent = handover != nullptr;
  if (handover) plan.awaited_units = handover->row_blocks, plan.awaited_routes = handover->split_routes;
  RowMaps row_maps;
  CUtensorMap column_map;
  WD_TRY(describe_rows(&row_maps.box[0], (const T *)m.data + m.offset, s.intermediate,
                       (s.experts - 1) * expert_rows + s.hidden, m.row_stride, Down<T, Sizes>::kBoxRows));
  row_maps.box[1] = row_maps.box[0]; // not used
  WD_TRY(describe_columns(&column_map, columns, s.intermediate, 2 * wd_column_groups(&s), Sizes::kBox));
  dim3 grid;
  WD_TRY(tiled_grid<Sizes>(&grid, &plan, s, Sizes::kColumns / 2));
  return launch_shared<down_tiled_kernel<T, Sizes>>("down_tiled", grid, dim3(kTiledThreads), sizeof(TiledShared<Sizes>),
                                                    stream, true, args, plan, row_maps, column_map);
}

template <class T>
static wd_status down_dtype(const wd_down_args &args, const RouteLists &lists, const void *columns,
                            const wd_cuda_handover *handover, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  const auto launch = [&](auto sizes) {
    return down_sizes<T, decltype(sizes)>(args, lists, columns, handover, stream);
  };
  const int units = units_of(s), parts = Down<T, FewRoutes>::kParts;
  if (routes_an_expert(s, kFewRoutes)) return choose_units<FewRoutes>(s, units, parts, launch);
  if (routes_an_expert(s, kSomeRoutes)) return choose_units<SomeRoutes>(s, units, parts, launch);
  return choose_units<ManyRoutes>(s, units, parts, launch);
}

wd_status down_tiled(const wd_down_args &args, const RouteLists &lists, const void *columns,
                     const wd_cuda_handover *handover, cudaStream_t stream) {
  return args.shape.dtype == WD_BF16 ? down_dtype<bf16>(args, lists, columns, handover, stream)
                                     : down_dtype<f16>(args, lists, columns, handover, stream);
}

} // namespace wd
