// direct.cuh - the dot product of a warp with one route: rows and column through a ring in shared memory.
//
// A lane copies where the rows lie (128 bytes of one row by eight lanes), reads what a product wants (common.cuh). The
// ring holds AHEAD steps of 64 values: at T = 1 an SM has five or six warps, so each must have several kilobytes on its
// way. Not in registers: where loads cross a loop's end ptxas gives them one scoreboard, and waits for the youngest
// with the oldest.
#pragma once
#include "copies.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace wd {

// Bytes of a warp's ring.
template <int PARTS, int AHEAD> __host__ __device__ constexpr size_t direct_bytes() {
  return (size_t)AHEAD * (16 + PARTS) * kStepBytes;
}

// Calls launch(Constant<AHEAD>). As many steps ahead as let all blocks of an SM have their rings at once, but no more
// than 150 KB of weights on their way to an SM: beyond that they only wait behind each other (down of Qwen3-30B-A3B at
// T = 1, alone: 10.7 us with 196 KB, 9.4 with 131). Where the blocks are too many for that, two of them.
template <int PARTS, class Launch> wd_status choose_ahead(int64_t blocks, int warps, Launch launch) {
  constexpr int64_t kOnTheirWay = 150 << 10;
  int sms, limit;
  WD_TRY(multiprocessors(&sms));
  WD_TRY(shared_memory_of_block(&limit));
  const int64_t at_once = (blocks + sms - 1) / sms;
  const auto room = [&](size_t ring, int64_t together) { // 2048: what else a block has in shared memory
    return ((int64_t)ring * warps + 2048) * together <= limit;
  };
  const auto suits = [&](int ahead, size_t ring) {
    return room(ring, at_once) && at_once * warps * ahead * 16 * kStepBytes <= kOnTheirWay;
  };
  if (suits(12, direct_bytes<PARTS, 12>())) return launch(Constant<12>());
  if (suits(8, direct_bytes<PARTS, 8>())) return launch(Constant<8>());
  if (suits(6, direct_bytes<PARTS, 6>())) return launch(Constant<6>());
  if (suits(4, direct_bytes<PARTS, 4>())) return launch(Constant<4>());
  if (room(direct_bytes<PARTS, 3>(), at_once)) return launch(Constant<3>());
  if (room(direct_bytes<PARTS, 4>(), 2)) return launch(Constant<4>());
  if (room(direct_bytes<PARTS, 3>(), 1)) return launch(Constant<3>());
  return launch(Constant<2>()); // 16 slots where a block has 99 KB
}

// c[part] = 16 rows . one column, which lies in all eight places of a tile: c[part][0][0] is row g of the lane,
// c[part][0][2] row g + 8, as in block_dot (grouped.cuh). low: row 0; row g + 8 is high_stride behind row g. Rows 8 to
// 15 are read where has_high. before_columns() runs between the first copies of weights and the first of activations.
template <class T, int PARTS, int AHEAD, class Before>
__device__ __forceinline__ void direct_dot(float (&c)[PARTS][1][4], const T *low, int64_t high_stride, bool has_high,
                                           const T *column, int64_t part_stride, int length, uint8_t *ring,
                                           Before before_columns) {
  constexpr int kSlotBytes = (16 + PARTS) * kStepBytes;
  const int lane = threadIdx.x % 32, chunks = chunks_of(length), steps = (chunks + 1) / 2;
  const uint32_t base = shared_address(ring);
  const uint32_t arrival = base + place_of(lane / 8, lane % 8), column_arrival = base + 16 * kStepBytes + lane * 16;
  const uint32_t own = base + place_of(lane / 4, lane % 4), column_own = base + 16 * kStepBytes + lane % 4 * 16;
  const T *rows = low + (int64_t)(lane / 8) * length + lane % 8 * 8;
  const T *values = column + lane / 8 * part_stride + lane % 8 * 8;
  auto copy_rows = [&](int step, uint32_t slot) {
    const bool valid = step * kStep + lane % 8 * 8 < length;
    const T *p = rows + step * kStep;
    copy_ahead(arrival + slot, p, valid);
    copy_ahead(arrival + slot + 4 * kStepBytes, p + 4 * length, valid);
    copy_ahead(arrival + slot + 8 * kStepBytes, p + high_stride, valid && has_high);
    copy_ahead(arrival + slot + 12 * kStepBytes, p + high_stride + 4 * length, valid && has_high);
  };
  auto copy_column = [&](int step, uint32_t slot) {
    if (lane < 8 * PARTS)
      copy_ahead(column_arrival + slot, values + step * kStep, step * kStep + lane % 8 * 8 < length);
  };
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    copy_rows(i, i * kSlotBytes);
  before_columns();
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    copy_column(i, i * kSlotBytes);
    close_copies();
  }
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      c[part][0][i] = 0.0f;
  uint32_t slot = 0;
  for (int step = 0; step < steps; step++) {
    uint4 a[2][2], b[2][PARTS];
    await_copies<AHEAD - 1>();
    __syncwarp();
#pragma unroll
    for (int chunk = 0; chunk < 2; chunk++) {
      a[chunk][0] = load_shared((own ^ chunk * 64) + slot);
      a[chunk][1] = load_shared((own ^ chunk * 64) + slot + 8 * kStepBytes);
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        b[chunk][part] = load_shared(column_own + slot + part * kStepBytes + chunk * 64);
    }
    __syncwarp();
    if (step + AHEAD < steps) {
      copy_rows(step + AHEAD, slot);
      copy_column(step + AHEAD, slot);
    }
    close_copies();
    slot = slot + kSlotBytes == AHEAD * kSlotBytes ? 0 : slot + kSlotBytes;
#pragma unroll
    for (int chunk = 0; chunk < 2; chunk++) {
      if (2 * step + chunk >= chunks) continue; // a product of zeros could turn a sum of -0 into +0
      const uint4 &low_row = a[chunk][0], &high_row = a[chunk][1];
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        Element<T>::mma(c[part][0], low_row.x, high_row.x, low_row.y, high_row.y, b[chunk][part].x, b[chunk][part].y);
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        Element<T>::mma(c[part][0], low_row.z, high_row.z, low_row.w, high_row.w, b[chunk][part].z, b[chunk][part].w);
    }
  }
}

} // namespace wd
