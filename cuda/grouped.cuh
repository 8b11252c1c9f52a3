// grouped.cuh - the dot products of a block: the warps' rows with the columns of one expert's routes, which all its
// warps share, through a ring in shared memory.
//
// The ring holds AHEAD steps (rows.cuh); one is multiplied while the others are on their way. A column
// is copied once for the block's rows: read by every warp for itself, columns would cost L2 as much as the weights.
#pragma once
#include "device.cuh"
#include "launch.cuh"
#include "routes.cuh"
#include "rows.cuh"
#include <math.h>

namespace wd {

// The sizes of a kernel: warps of a block, tiles of 8 routes at a time, steps in the ring. Few routes an expert: small
// blocks, because few of them run, and the last ones should be short; many: large ones, which share more columns.
template <int WARPS, int TILES, int AHEAD> struct GroupedSizes {
  static constexpr int kWarps = WARPS, kTiles = TILES, kMiddleTiles = TILES < 2 ? 1 : 2, kAhead = AHEAD,
                       kThreads = 32 * WARPS, kRoutes = 8 * TILES;
  // Bytes of one step of the ring, with PARTS columns a route.
  template <class Rows> __host__ __device__ static constexpr int slot_bytes(int parts) {
    return WARPS * Rows::kStepBytesOfWarp + kRoutes * parts * 2 * Rows::kStep;
  }
  template <class Rows> __host__ __device__ static constexpr int ring_bytes(int parts) {
    return AHEAD * slot_bytes<Rows>(parts);
  }
};

// Whether a block of these sizes has room for its ring, its list of routes, and little else.
template <class Sizes, class Rows> wd_status has_room(bool *has, const wd_moe_shape &s, int parts) {
  int limit;
  WD_TRY(shared_memory_of_block(&limit));
  *has = Sizes::template ring_bytes<Rows>(parts) + searched_bytes(s) + 1024 <= (size_t)limit;
  return WD_OK;
}
// How many times `blocks` an expert fill the GPU, `resident` at a time on each multiprocessor. Experts: as many as ids
// drawn evenly meet.
inline wd_status waves_of(double *waves, const wd_moe_shape &s, int blocks, int resident) {
  int sms;
  WD_TRY(multiprocessors(&sms));
  const double experts = s.experts * (1 - pow(1 - fmin(1.0, (double)s.top_k / s.experts), (double)s.tokens));
  *waves = experts * blocks / ((double)sms * resident);
  return WD_OK;
}
// How well: the last wave may be nearly empty.
inline double filled(double waves) {
  return waves / ceil(waves);
}

// c[row tile][part][tile] = the warp's rows . columns (8 a tile); all threads of the block call it together.
// column_of(i, part): values of column i, NULL where there is none. WAITS and wait(): as in direct_dot (direct.cuh).
template <class T, class Sizes, int TILES, int PARTS, bool WAITS, class Rows, class ColumnOf, class Wait>
__device__ __forceinline__ void block_dot(float (&c)[Rows::kTiles][PARTS][TILES][4], const Rows &rows,
                                          ColumnOf column_of, int length, uint32_t ring, Wait wait) {
  constexpr int AHEAD = Sizes::kAhead, slot_bytes = Sizes::template slot_bytes<Rows>(PARTS);
  constexpr int kStep = Rows::kStep, kColumnBytes = 2 * kStep, kPieces = kColumnBytes / 16, kChunks = kStep / kChunk;
  constexpr int kColumns = 8 * TILES * PARTS, kAtOnce = Sizes::kThreads / kPieces,
                kCopies = (kColumns + kAtOnce - 1) / kAtOnce;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int chunks = chunks_of(length), steps = (chunks + kChunks - 1) / kChunks;
  // the warps' rows, then the columns of part 0, of part 1
  const uint32_t warp_rows = ring + warp * Rows::kStepBytesOfWarp;
  const uint32_t columns = ring + Sizes::kWarps * Rows::kStepBytesOfWarp;
  const uint32_t own_column = place_of(lane / 4, lane % 4, kColumnBytes);
  const T *column[kCopies];
  uint32_t column_arrival[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; i++) {
    const int index = i * kAtOnce + thread / kPieces;
    column[i] = index < kColumns ? column_of(index % (8 * TILES), index / (8 * TILES)) : nullptr;
    if (column[i]) column[i] += thread % kPieces * 8;
    column_arrival[i] = columns + place_of(index, thread % kPieces, kColumnBytes);
  }
  auto copy_columns = [&](int step, uint32_t slot) {
    const bool within = step * kStep + thread % kPieces * 8 < length;
#pragma unroll
    for (int i = 0; i < kCopies; i++)
      if (column[i]) copy_ahead(column_arrival[i] + slot, column[i] + step * kStep, within);
  };
  if (WAITS) {
#pragma unroll
    for (int i = 0; i < AHEAD - 1; i++)
      rows.copy(i, warp_rows + i * slot_bytes);
    wait();
  }
#pragma unroll
  for (int i = 0; i < AHEAD - 1; i++) {
    if (!WAITS) rows.copy(i, warp_rows + i * slot_bytes);
    copy_columns(i, i * slot_bytes);
    close_copies();
  }
  if (!WAITS) wait();
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
    for (int chunk = 0; chunk < kChunks; chunk++) {
      if (kChunks * step + chunk >= chunks) continue; // a product of zeros could turn a sum of -0 into +0
      Operand a[Rows::kTiles];
      rows.read(a, chunk, warp_rows + slot);
      uint4 v[PARTS][TILES];
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          v[part][tile] =
              load_shared(columns + slot + (own_column ^ chunk * 64) + (part * TILES + tile) * 8 * kColumnBytes);
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
