// grouped.cuh - the dot products of a block: the warps' rows with the columns of one expert's routes, which all its
// warps share, through a ring in shared memory.
//
// The ring holds AHEAD steps of 64 values (copies.cuh); one is multiplied while the others are on their way. A column
// is copied once for the block's rows: read by every warp for itself, columns would cost L2 as much as the weights.
#pragma once
#include "rows.cuh"

namespace wd {

// The sizes of a kernel: warps of a block, tiles of 8 routes at a time, steps in the ring. Few routes an expert: small
// blocks, because few of them run, and the last ones should be short; many: large ones, which share more columns.
template <int WARPS, int TILES, int AHEAD> struct GroupedSizes {
  static constexpr int kWarps = WARPS, kTiles = TILES, kMiddleTiles = TILES < 2 ? 1 : 2, kAhead = AHEAD,
                       kThreads = 32 * WARPS, kRoutes = 8 * TILES;
  // Bytes of one step of the ring, with PARTS columns a route.
  template <class Rows> __host__ __device__ static constexpr int slot_bytes(int parts) {
    return WARPS * Rows::kStepBytesOfWarp + kRoutes * parts * kStepBytes;
  }
};

// c[row tile][part][tile] = the warp's rows . columns (8 a tile); all threads of the block call it together.
// column_of(i, part): values of column i, NULL where there is none. before_columns() runs between the first copies of
// weights and the first of columns.
template <class T, class Sizes, int TILES, int PARTS, class Rows, class ColumnOf, class Before>
__device__ __forceinline__ void block_dot(float (&c)[Rows::kTiles][PARTS][TILES][4], const Rows &rows,
                                          ColumnOf column_of, int length, uint32_t ring, Before before_columns) {
  constexpr int AHEAD = Sizes::kAhead, slot_bytes = Sizes::template slot_bytes<Rows>(PARTS);
  constexpr int kGroupedThreads = Sizes::kThreads;
  constexpr int kColumns = 8 * TILES * PARTS, kCopies = (kColumns * 8 + kGroupedThreads - 1) / kGroupedThreads;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int chunks = chunks_of(length), steps = (chunks + 1) / 2;
  // the warps' rows, then the columns of part 0, of part 1
  const uint32_t warp_rows = ring + warp * Rows::kStepBytesOfWarp;
  const uint32_t columns = ring + Sizes::kWarps * Rows::kStepBytesOfWarp;
  const uint32_t own_column = columns + place_of(lane / 4, lane % 4);
  const T *column[kCopies];
  uint32_t column_arrival[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; i++) {
    const int index = i * (kGroupedThreads / 8) + thread / 8;
    column[i] = index < kColumns ? column_of(index % (8 * TILES), index / (8 * TILES)) : nullptr;
    if (column[i]) column[i] += thread % 8 * 8;
    column_arrival[i] = columns + place_of(index, thread % 8);
  }
  auto copy_columns = [&](int step, uint32_t slot) {
    const bool within = step * kStep + thread % 8 * 8 < length;
#pragma unroll
    for (int i = 0; i < kCopies; i++)
      if (column[i]) copy_ahead(column_arrival[i] + slot, column[i] + step * kStep, within);
  };
#pragma unroll
  for (int i = 0; i < AHEAD - 1; i++)
    rows.copy(i, warp_rows + i * slot_bytes);
  before_columns();
#pragma unroll
  for (int i = 0; i < AHEAD - 1; i++) {
    copy_columns(i, i * slot_bytes);
    close_copies();
  }
#pragma unroll
  for (int row_tile = 0; row_tile < Rows::kTiles; row_tile++)
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          c[row_tile][part][tile][i] = 0.0f;
  uint32_t slot = 0, free_slot = (AHEAD - 1) * slot_bytes; // of this step; of the one before, which all have read
  for (int step = 0; step < steps; step++) {
    await_copies<AHEAD - 2>();
    __syncthreads();
    if (step + AHEAD - 1 < steps) {
      rows.copy(step + AHEAD - 1, warp_rows + free_slot);
      copy_columns(step + AHEAD - 1, free_slot);
    }
    close_copies();
#pragma unroll
    for (int chunk = 0; chunk < 2; chunk++) {
      if (2 * step + chunk >= chunks) continue; // a product of zeros could turn a sum of -0 into +0
      Operand a[Rows::kTiles];
      rows.read(a, chunk, warp_rows + slot);
      uint4 v[PARTS][TILES];
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          v[part][tile] = load_shared((own_column ^ chunk * 64) + slot + (part * TILES + tile) * 8 * kStepBytes);
#pragma unroll
      for (int row_tile = 0; row_tile < Rows::kTiles; row_tile++)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
            Element<T>::mma(c[row_tile][part][tile], a[row_tile].first, v[part][tile].x, v[part][tile].y);
#pragma unroll
      for (int row_tile = 0; row_tile < Rows::kTiles; row_tile++)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
            Element<T>::mma(c[row_tile][part][tile], a[row_tile].second, v[part][tile].z, v[part][tile].w);
    }
    free_slot = slot;
    slot = slot + slot_bytes == AHEAD * slot_bytes ? 0 : slot + slot_bytes;
  }
  await_copies<0>(); // of short rows some are on their way still: zeros, into places that may be filled again
  __syncthreads();
}

} // namespace wd
