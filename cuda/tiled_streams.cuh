// tiled_streams.cuh - the tiled schedule (tiled.cuh): how columns and weights come into shared memory.
#pragma once
#include "arrange.cuh"
#include "tiled_plan.cuh"

namespace wd {

// This thread's arrival at the barrier, once all its copies so far have come.
__device__ __forceinline__ void arrive_with_copies(uint64_t *barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// The producer warps: each brings a part of every step of each item's columns. Op: see tiled().
//
// wgmma reads 16 values of k as two matrices of 8 columns x 16 bytes. Arranged columns (arrange.cuh) have the words of
// a matrix row side by side, so 16 bytes are copied as they are.
template <class T, class Sizes, class Op>
__device__ __forceinline__ void produce(const Op &op, const wd_moe_shape &s, const TiledPlan &plan,
                                        TiledShared<Sizes> &shared) {
  constexpr int ROUTES = Sizes::kColumns / Op::kParts;
  constexpr int STRIDE = 8 * Sizes::kProducers; // columns that the producers copy at once: 4 lanes a column and chunk
  const int thread = threadIdx.x - Sizes::kMultiplyingThreads, own = thread / 4, piece = thread % 4;
  const int steps = steps_of(op.length()), pitch = arranged(op.length());
  const uint32_t target = shared_address(shared.columns) + piece * Sizes::kMatrixBytes;
  const T *source = op.columns() + piece * 8;
  Walk<Sizes, ROUTES> walk(shared, plan, s.experts);
  Item item;
  if (plan.dependent) wait_for_previous_grid();
  int stage = 0, round = 1; // round: parity of the phase that must have ended
  for (int number = 0; walk.next(&item); number++) {
    const int place = number % 2;
    barrier_wait(&shared.routes_free[place], (number / 2 + 1) % 2);
    const int columns = columns_for<Sizes, Op::kParts>(item.count), per_part = columns / Op::kParts;
    for (int column = thread; column < columns; column += 32 * Sizes::kProducers) {
      const int i = column % per_part;
      const int route = i < item.count ? plan.lists.routes[item.first + i] : -1;
      if (column < per_part) shared.routes[place][i] = route;
      shared.rows[place][column] = route >= 0 ? op.column_row(route, column / per_part) : -1;
    }
    producers_meet<Sizes>();
    for (int step = 0; step < steps; step++) {
      const bool both = step * kStep + kChunk < pitch; // chunks
      barrier_wait(&shared.empty[stage], round);
#pragma unroll 4
      for (int column = own; column < columns; column += STRIDE) {
        const int row = shared.rows[place][column];
        const uint32_t arrival = target + stage * Sizes::kColumnBytes + column * 16;
        const T *p = source + (int64_t)max(row, 0) * pitch + step * kStep;
        copy_ahead(arrival, p, row >= 0);
        copy_ahead(arrival + 4 * Sizes::kMatrixBytes, p + kChunk, row >= 0 && both);
      }
      arrive_with_copies(&shared.full[stage]);
      if (++stage == Sizes::kStages) stage = 0, round ^= 1;
    }
  }
}

// A multiplying warp's weights: 32 rows, copied to a ring of its own in shared memory, some steps ahead of the products
// and on into the next items. Row 16 * half + 8 * high + g is row low or high of lane group g in a half of the tile.
// Not to registers: where loads cross a loop's end ptxas gives them one scoreboard, and waits for the youngest with the
// oldest.
template <class T, class Sizes, class Op> struct WeightStream {
  static constexpr int ROUTES = Sizes::kColumns / Op::kParts;
  const Op &op;
  Walk<Sizes, ROUTES> walk;
  const int length, steps;
  int64_t place[4];            // bytes: of this lane's 16 in row lane / 8 + 4 i of half 0, at the step to load next
  uint32_t target, own;        // where this lane's copies go, and where it reads, in the ring's first slot
  int left, lane_left;         // steps to load of this item; values from this lane's on
  uint32_t load_slot, my_slot; // bytes from the first slot
  bool exists, some[2];        // an item to load from; rows of groups 0 to 3, 4 to 7 in it

  __device__ __forceinline__ WeightStream(const Op &op, const Walk<Sizes, ROUTES> &walk, TiledShared<Sizes> &shared)
      : op(op), walk(walk), length(op.length()), steps(steps_of(length)), load_slot(0), my_slot(0) {
    const int lane = threadIdx.x % 32;
    const uint32_t ring = shared_address(shared.weights[0]) + threadIdx.x / 32 * Sizes::kWarpBytes;
    target = ring + place_of(lane / 8, lane % 8), own = ring + place_of(lane / 4, lane % 4);
    enter();
    for (int i = 0; i < Sizes::kWeightsAhead; i++)
      load();
  }
  __device__ __forceinline__ void enter() {
    const int group = threadIdx.x / kWarpgroup, warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    Item item;
    exists = walk.next(&item);
    some[0] = some[1] = false;
    left = steps, lane_left = length - lane % 8 * 8;
    if (!exists || group >= item.units) return;
    const int64_t first = (int64_t)(op.row(item.expert, item.unit + group, warp, lane / 8) + lane % 8 * 8);
    some[0] = op.exists(item.unit + group, warp, lane / 8);
    some[1] = op.exists(item.unit + group, warp, lane / 8 + 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
      place[i] = first + 2 * (i / 2 * op.high_stride() + i % 2 * op.four_groups());
  }
  __device__ __forceinline__ void load() {
    if (exists) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const bool valid = lane_left > 0 && some[i % 2];
        copy_ahead(target + load_slot + i * 4 * kStepBytes, (const void *)place[i], valid);
        copy_ahead(target + load_slot + (i + 4) * 4 * kStepBytes, (const void *)(place[i] + 2 * op.half_stride()),
                   valid);
        place[i] += kStepBytes;
      }
      lane_left -= kStep;
      if (--left == 0) enter();
    }
    close_copies();
    load_slot = load_slot + Sizes::kRowBytes == sizeof(TiledShared<Sizes>::weights) ? 0 : load_slot + Sizes::kRowBytes;
  }
  // The oldest step: chunk, half, low and high row. load() then takes its place.
  __device__ __forceinline__ void take(uint4 (&a)[2][2][2]) {
    await_copies<Sizes::kWeightsAhead - 1>();
    __syncwarp();
#pragma unroll
    for (int chunk = 0; chunk < 2; chunk++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int high = 0; high < 2; high++)
          a[chunk][half][high] = load_shared((own ^ chunk * 64) + my_slot + (16 * half + 8 * high) * kStepBytes);
    __syncwarp();
    my_slot = my_slot + Sizes::kRowBytes == sizeof(TiledShared<Sizes>::weights) ? 0 : my_slot + Sizes::kRowBytes;
  }
};

} // namespace wd
