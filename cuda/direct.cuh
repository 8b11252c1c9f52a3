// direct.cuh - the dot products of a warp with one route: rows and column through a ring in shared memory.
//
// A lane copies where the rows lie, reads what a product wants (rows.cuh). The ring holds AHEAD steps: at
// T = 1 an SM has five or six warps, so each must have several kilobytes on its way. Not in registers: where loads
// cross a loop's end ptxas gives them one scoreboard, and waits for the youngest with the oldest.
#pragma once
#include "device.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace wd {

// Bytes of a warp's ring.
template <class Rows, int PARTS, int AHEAD> __host__ __device__ constexpr size_t direct_bytes() {
  return (size_t)AHEAD * (Rows::kStepBytesOfWarp + PARTS * 2 * Rows::kStep);
}

// Calls launch(Constant<AHEAD>). As many steps ahead as let all blocks of an SM have their rings at once, but no more
// than `most` bytes of weights on their way to an SM: beyond that they only wait behind each other, and leave no room
// for the blocks of the next grid. Where the blocks are too many for that, all of them with short rings, or, with
// longer ones, two at a time.
template <class Rows, int PARTS, class Launch>
wd_status choose_ahead(int64_t blocks, int warps, int64_t most, Launch launch) {
  int sms, limit;
  WD_TRY(multiprocessors(&sms));
  WD_TRY(shared_memory_of_block(&limit));
  const int64_t at_once = (blocks + sms - 1) / sms;
  const auto room = [&](size_t ring, int64_t together) {
    return (int64_t)direct_shared_bytes(warps, ring) * together <= limit;
  };
  const auto suits = [&](int ahead, size_t ring) {
    return room(ring, at_once) && at_once * warps * ahead * Rows::kStepBytesOfWarp <= most;
  };
  if (suits(6, direct_bytes<Rows, PARTS, 6>())) return launch(Constant<6>());
  if (suits(4, direct_bytes<Rows, PARTS, 4>())) return launch(Constant<4>());
  if (suits(3, direct_bytes<Rows, PARTS, 3>())) return launch(Constant<3>());
  if (suits(2, direct_bytes<Rows, PARTS, 2>())) return launch(Constant<2>());
  if (room(direct_bytes<Rows, PARTS, 2>(), at_once)) return launch(Constant<2>());
  if (room(direct_bytes<Rows, PARTS, 4>(), 2)) return launch(Constant<4>());
  if (room(direct_bytes<Rows, PARTS, 3>(), 2)) return launch(Constant<3>());
  if (room(direct_bytes<Rows, PARTS, 2>(), 2)) return launch(Constant<2>());
  if (room(direct_bytes<Rows, PARTS, 3>(), 1)) return launch(Constant<3>());
  return launch(Constant<2>()); // for which there is room: wd_cuda_serves()
}

// Shared memory for each of so many blocks of a grid that starts before the one before it has ended: so much that an SM
// has room for no more of them than its share. Else those that are free first take more, and the others have none
// (Mixtral-8x7B at T = 1: the layer took 173.3 us, with this 164.0; GLM-4.5-Air 70.1, 67.1).
inline wd_status spread_bytes(size_t *bytes, int64_t blocks) {
  int sms, limit;
  WD_TRY(multiprocessors(&sms));
  WD_TRY(shared_memory_of_block(&limit));
  const size_t share = limit / ((blocks + sms - 1) / sms + 1); // one more block would have less
  if (*bytes + 1024 < share) *bytes = share - 1024; // what the system takes of every block's; never less than is needed
  return WD_OK;
}

// Whether transposed weights are read 64 rows a warp rather than 32, so that lines are twice as long: where there are
// then three warps an SM still, or, where gates lie apart from ups and lines would be 32 bytes, half as many. rows: of
// all routes.
inline wd_status long_lines(bool *serves, int64_t rows, bool apart) {
  int sms;
  WD_TRY(multiprocessors(&sms));
  *serves = rows / 64 * (apart ? 2 : 1) >= 3 * sms;
  return WD_OK;
}

// c[tile][part] = the warp's rows . one column, which lies in all eight places of a tile of columns: c[..][0][0] is row
// g of the lane, c[..][0][2] row g + 8, as in block_dot (grouped.cuh). WAITS: the grid before writes the column; then
// the first copies of weights leave at once, and wait() runs before the first of the column. Else wait() runs behind
// both, and the first step can be multiplied while the others are on their way.
template <class T, int PARTS, int AHEAD, bool WAITS, class Rows, class Wait>
__device__ __forceinline__ void direct_dot(float (&c)[Rows::kTiles][PARTS][1][4], const Rows &rows, const T *column,
                                           int64_t part_stride, int length, uint8_t *ring, Wait wait) {
  constexpr int kStep = Rows::kStep, kColumnBytes = 2 * kStep, kPieces = kColumnBytes / 16, kChunks = kStep / kChunk;
  // Without branches the products of a step run between its copies: worth it where a few warps read long lines, but
  // copies of nothing follow the last step.
  constexpr bool kBranches = Rows::kTiles == 1;
  constexpr int kTogether = Rows::kTiles == 4 ? 1 : 2; // chunks in registers: as many as there are registers for
  constexpr int kRowBytes = Rows::kStepBytesOfWarp, kSlotBytes = kRowBytes + PARTS * kColumnBytes;
  const int lane = threadIdx.x % 32, chunks = chunks_of(length), steps = (chunks + kChunks - 1) / kChunks;
  const uint32_t base = shared_address(ring), column_arrival = base + kRowBytes + lane * 16,
                 column_own = base + kRowBytes + lane % 4 * 16;
  const T *values = column + lane / kPieces * part_stride + lane % kPieces * 8;
  auto copy_column = [&](int step, uint32_t slot) {
    const bool own = lane < kPieces * PARTS, within = step * kStep + lane % kPieces * 8 < length;
    if (kBranches) {
      if (own) copy_ahead(column_arrival + slot, values + step * kStep, within);
    } else {
      copy_ahead_if(own, column_arrival + slot, values + step * kStep, within);
    }
  };
  if (WAITS) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      rows.copy(i, base + i * kSlotBytes);
    wait();
  }
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (!WAITS) rows.copy(i, base + i * kSlotBytes);
    copy_column(i, i * kSlotBytes);
    close_copies();
  }
  if (!WAITS) wait();
#pragma unroll
  for (int tile = 0; tile < Rows::kTiles; tile++)
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        c[tile][part][0][i] = 0.0f;
  uint32_t slot = 0;
  for (int step = 0; step < steps; step++) {
    await_copies<AHEAD - 1>();
    __syncwarp();
#pragma unroll
    for (int first = 0; first < kChunks; first += kTogether) {
      Operand a[kTogether][Rows::kTiles];
      uint4 b[kTogether][PARTS];
#pragma unroll
      for (int chunk = 0; chunk < kTogether; chunk++) {
        rows.read(a[chunk], first + chunk, base + slot);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          b[chunk][part] = load_shared(column_own + slot + part * kColumnBytes + (first + chunk) * 64);
      }
      if (first + kTogether == kChunks) { // all is read: the next takes its place
        __syncwarp();
        if (!kBranches || step + AHEAD < steps) {
          rows.copy(step + AHEAD, base + slot);
          copy_column(step + AHEAD, slot);
        }
        close_copies();
      }
#pragma unroll
      for (int chunk = 0; chunk < kTogether; chunk++) {
        if (kChunks * step + first + chunk >= chunks) continue; // a product of zeros could turn a sum of -0 into +0
#pragma unroll
        for (int tile = 0; tile < Rows::kTiles; tile++)
#pragma unroll
          for (int part = 0; part < PARTS; part++)
            Element<T>::mma(c[tile][part][0], a[chunk][tile].first, b[chunk][part].x, b[chunk][part].y);
#pragma unroll
        for (int tile = 0; tile < Rows::kTiles; tile++)
#pragma unroll
          for (int part = 0; part < PARTS; part++)
            Element<T>::mma(c[tile][part][0], a[chunk][tile].second, b[chunk][part].z, b[chunk][part].w);
      }
    }
    slot = slot + kSlotBytes == AHEAD * kSlotBytes ? 0 : slot + kSlotBytes;
  }
}

} // namespace wd
