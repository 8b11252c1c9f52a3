// down_rows.cuh - which rows a warp of moe_down_3d_batched has: 16 hidden rows of one expert, or two or four times as
// many where weights are transposed.
#pragma once
#include "rows.cuh"

namespace wd {

template <class Rows> struct DownRows;
template <class T, int STEP> struct DownRows<PlainRows<T, STEP>> {
  static __device__ __forceinline__ PlainRows<T, STEP> of(const wd_down_args &args, int expert, int first) {
    const T *rows = rows_of<T>(args.down, expert) + first * args.down.row_stride;
    return PlainRows<T, STEP>(rows, rows + 8 * args.down.row_stride, args.down.row_stride, args.shape.hidden - first,
                              args.shape.intermediate);
  }
};
template <class T, int TILES> struct DownRows<TransposedRows<T, TILES>> {
  static __device__ __forceinline__ TransposedRows<T, TILES> of(const wd_down_args &args, int expert, int first) {
    const int row = first + 8 * (threadIdx.x % (2 * TILES));
    return TransposedRows<T, TILES>(row < args.shape.hidden ? rows_of<T>(args.down, expert) + row : nullptr,
                                    args.down.k_stride, args.shape.intermediate);
  }
};
// A lane's row of those, of `tile`, low or high: as both kinds of rows have them.
template <class Rows> __device__ __forceinline__ int row_in_warp(int tile, int high) {
  return 8 * (tile + high * Rows::kTiles) + threadIdx.x % 32 / 4;
}

} // namespace wd
