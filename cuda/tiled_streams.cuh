// tiled_streams.cuh - the tiled schedule (tiled.cuh): how rows and columns come into shared memory, and rows out of it.
#pragma once
#include "tiled_plan.cuh"

namespace wd {

// One thread takes the items of its block, and has every step of each brought. Op: see tiled().
template <class Sizes, class Op> struct Bringer {
  static constexpr int PARTS = Op::kParts, BOXES = kUnitRows / Op::kBoxRows;
  const Op &op;
  const wd_moe_shape &s;
  const TiledPlan &plan;
  const RowMaps &rows;
  const CUtensorMap &columns;
  TiledShared<Sizes> &shared;

  __device__ __forceinline__ void bring_rows(const Item &item, int step, int stage) const {
    for (int unit = 0; unit < item.units; unit++)
#pragma unroll
      for (int box = 0; box < BOXES; box++)
        copy_rows(shared.rows[stage][unit] + box * Op::kBoxRows * kStepBytes, rows.box[box], step * kStep,
                  item.expert * plan.expert_rows + op.box(item.unit + unit, box), &shared.full[stage], item.policy);
  }
  // Waits until gate_up has served the expert; returns whether it has served all. Its blocks have all begun: it let
  // this grid in only then.
  __device__ __forceinline__ bool meet(int expert) const {
    const int32_t *const served = plan.lists.served;
    const int own = awaited_of(shared.offsets[expert + 1] - shared.offsets[expert], plan);
    bool all;
    do
      all = load_relaxed(served + s.experts) == shared.awaited;
    while (load_relaxed(served + expert) != own && !all);
    __threadfence();
    allow_copies_of_written();
    return all;
  }
  __device__ __forceinline__ void run() const {
    const int steps = steps_of(op.length());
    Item item = item_at<Sizes, PARTS>(blockIdx.x, shared, s, plan);
    // steps whose rows come before the grid before has ended
    int early = item.units > 0 ? min(steps, Sizes::kStages) : 0;
    for (int step = 0; step < early; step++) {
      barrier_promise(&shared.full[step], item.units * kUnitBytes);
      bring_rows(item, step, step);
    }
    bool met = plan.awaited_units == 0; // whether all columns are there
    if (plan.dependent && met) wait_for_previous_grid(), allow_copies_of_written();
    int stage = 0, round = 1; // round: parity of the phase that must have ended
    for (int number = 0;; number++) {
      shared.items[number % kItems] = item;
      if (item.units == 0) break;
      const int next = gridDim.x + atomicAdd(plan.taken, 1); // on its way while this item is brought
      const int groups = (item.count + kGroup - 1) / kGroup * Op::kParts;
      const int boxes = (groups + Sizes::kBox - 1) / Sizes::kBox, column_bytes = boxes * Sizes::kBox * kGroupStepBytes;
      for (int step = 0; step < steps; step++) {
        barrier_wait(&shared.empty[stage], round);
        if (early > 0) {
          early--;
          barrier_expect(&shared.full[stage], column_bytes);
        } else {
          barrier_expect(&shared.full[stage], column_bytes + item.units * kUnitBytes);
          bring_rows(item, step, stage);
        }
        if (step == 0 && !met) met = meet(item.expert);
        for (int box = 0; box < boxes; box++)
          copy_columns(shared.columns[stage][box * Sizes::kBox], columns, step * (kStep / 8),
                       item.group * Op::kParts + box * Sizes::kBox, &shared.full[stage]);
        if (++stage == Sizes::kStages) stage = 0, round ^= 1;
      }
      item = item_at<Sizes, PARTS>(next, shared, s, plan);
    }
    if (plan.awaited_units > 0) wait_for_previous_grid(); // so that this grid's end is that one's, too
    barrier_wait(&shared.empty[stage], round);
    barrier_expect(&shared.full[stage], 0); // that there is no item any more
  }
};

// Where a multiplying lane finds its rows' pieces in a stage. The boxes lie in rows of 128 bytes whose pieces are
// permuted (tensor_map.cuh): piece p of row r is at p ^ r % 8. Lanes 0 to 7 read rows that differ in bit 2 (Op::row
// sees to that), so they meet in no bank.
template <class Sizes, class Op> struct RowReader {
  uint32_t own[2][2]; // [half][high]: the first chunk's piece in stage 0; the second chunk's is at ^ 64
  __device__ __forceinline__ explicit RowReader(TiledShared<Sizes> &shared) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const uint32_t unit = shared_address(shared.rows[0][threadIdx.x / kWarpgroup]);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int high = 0; high < 2; high++) {
        const int row = Op::row(warp, lane / 4, half, high);
        own[half][high] = unit + row * kStepBytes + (lane % 4 ^ row % 8) * 16;
      }
  }
  // a[half][high], of a chunk of the step
  __device__ __forceinline__ void read(uint4 (&a)[2][2], int stage, int chunk) const {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int high = 0; high < 2; high++)
        a[half][high] = load_shared((own[half][high] ^ chunk * 64) + stage * (kUnits * kUnitBytes));
  }
};

} // namespace wd
