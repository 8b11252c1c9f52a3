// tiled_streams.cuh - the tiled schedule (tiled.cuh): how rows and columns come into shared memory, and rows out of it.
#pragma once
#include "tiled_plan.cuh"

namespace wd {

// Columns that lie in memory as matrices (down's; gate_up's, gathered): boxes, which the tensor memory accelerator
// brings. One lane.
template <class Sizes, int PARTS> struct BoxedColumns {
  using Source = CUtensorMap;
  static constexpr bool kByWarp = false;
  static constexpr int kTurns = 1;
  const CUtensorMap &map;
  TiledShared<Sizes> &shared;
  int first, boxes;

  __device__ __forceinline__ BoxedColumns(const Source &map, const TiledPlan &, const wd_moe_shape &,
                                          TiledShared<Sizes> &shared, int)
      : map(map), shared(shared) {
  }
  __device__ __forceinline__ void begin(const Item &item) {
    first = item.group * PARTS;
    boxes = ((item.count + kGroup - 1) / kGroup * PARTS + Sizes::kBox - 1) / Sizes::kBox;
  }
  __device__ __forceinline__ void bring(int step, int stage) {
    barrier_expect(&shared.columns_full[stage], boxes * Sizes::kBox * kGroupStepBytes);
    for (int box = 0; box < boxes; box++)
      copy_columns(shared.columns[stage][box * Sizes::kBox], map, step * (kStep / 8), first + box * Sizes::kBox,
                   &shared.columns_full[stage]);
  }
  __device__ __forceinline__ void end() {
  }
};

// Columns that are tokens (gate_up), put into matrices on their way: 16 bytes at a time, by all lanes of two warps,
// which take turns, a step each. A step is told of when its warp has asked for kBehind more, so that many are on their
// way.
template <class Sizes> struct TokenColumns {
  using Source = const void *;
  static constexpr bool kByWarp = true;
  static constexpr int kTurns = 2, kBehind = 1;
  // Multiplying warps wait for a step before they give the one before it back: with a stage less they would wait for
  // what is told of only when that stage has been filled again.
  static_assert(kTurns * kBehind + 2 <= Sizes::kColumnStages);
  // So that each stage is always written by the same warp. racecheck reports writes to a stage by both in turn: it does
  // not follow what orders them, from a barrier through a multiplying warp to another barrier.
  static_assert(Sizes::kColumnStages % kTurns == 0);
  const RouteLists &lists;
  TiledShared<Sizes> &shared;
  int32_t *const places;     // where the item's tokens lie, in units of 16 bytes
  const uint4 *const source; // this lane's word of token 0, in chunk 0
  const int top_k, chunks;
  int count, asked, oldest; // routes; steps that are not told of, and the stage of their first

  __device__ __forceinline__ TokenColumns(Source tokens, const TiledPlan &plan, const wd_moe_shape &s,
                                          TiledShared<Sizes> &shared, int turn)
      : lists(plan.lists), shared(shared), places(shared.tokens[turn]),
        source((const uint4 *)tokens + threadIdx.x % 32 / kGroup), top_k(s.top_k), chunks(chunks_of(s.hidden)),
        asked(0), oldest(turn) {
  }
  __device__ __forceinline__ void begin(const Item &item) {
    count = item.count;
    __syncwarp(); // the last item's places have been read
    for (int i = threadIdx.x % 32; i < count; i += 32)
      places[i] = __ldcg(lists.routes + item.first + i) / top_k * (4 * chunks);
    __syncwarp();
  }
  __device__ __forceinline__ void bring(int step, int stage) {
    const int lane = threadIdx.x % 32;
    uint32_t to = shared_address(shared.columns[stage]) + lane / kGroup * kMatrixBytes + lane % kGroup * 16;
    const uint4 *const from = source + step * 8;
    const bool whole = 2 * step + 1 < chunks;
#pragma unroll 4
    for (int i = lane % kGroup; i - lane % kGroup < count; i += kGroup, to += kGroupStepBytes) {
      const bool valid = i < count; // else zeros: they fill a group
      const uint4 *const token = from + (valid ? places[i] : 0);
      copy_ahead(to, token, valid);
      copy_ahead_if(whole, to + 4 * kMatrixBytes, token + 4, valid);
    }
    close_copies();
    if (++asked <= kBehind) return;
    await_copies<kBehind>();
    tell();
  }
  __device__ __forceinline__ void end() {
    await_copies<0>();
    while (asked > 0)
      tell();
  }
  // That the oldest step is there: wgmma reads past what orders other accesses.
  __device__ __forceinline__ void tell() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.columns_full[oldest]);
    asked--;
    oldest = oldest + kTurns < Sizes::kColumnStages ? oldest + kTurns : oldest + kTurns - Sizes::kColumnStages;
  }
};

// One thread takes the items of its block, and has the rows of every step of each brought. Op: see tiled().
template <class Sizes, class Op> struct RowBringer {
  static constexpr int PARTS = Op::kParts, BOXES = kUnitRows / Op::kBoxRows;
  const Op &op;
  const wd_moe_shape &s;
  const TiledPlan &plan;
  const RowMaps &rows;
  TiledShared<Sizes> &shared;

  // A unit's steps [step, step + count), count <= kStepsTogether, into the stages from `stage` on; a barrier for each
  // stage, `apart` from one to the next.
  __device__ __forceinline__ void bring(const Item &item, int unit, int step, int count, int stage, uint64_t *barriers,
                                        int apart) const {
#pragma unroll
    for (int box = 0; box < BOXES; box++)
#pragma unroll
      for (int i = 0; i < kStepsTogether; i++) {
        if (i >= count) break;
        const int at = stage + i < Sizes::kRowStages ? stage + i : stage + i - Sizes::kRowStages;
        copy_rows(shared.rows[at][unit] + box * Op::kBoxRows * kStepBytes, rows.box[box], (step + i) * kStep,
                  item.expert * plan.expert_rows + op.box(item.unit + unit, box), barriers + at * apart, item.policy);
      }
  }
  // The first steps of the item that the block probably has: in part 0 some, before the grid before has ended, which
  // makes the lists or gathers by them, and in part 1, when it has, the others. All at once they were in the way of the
  // lists: OLMoE took 194.1 us at T = 128 (192.6 so), Qwen3-30B-A3B 270.8 at 64 (270.0).
  __device__ __forceinline__ void guess(int part) const {
    const Item item = guessed_item<Sizes>(s, plan);
    const int steps = guessed_steps();
    if (part == 0) {
      barrier_init(&shared.guessed, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      barrier_expect(&shared.guessed, item.units * steps * kUnitBytes);
    }
    constexpr int some = kStepsTogether * kWarpgroups / Sizes::kUnits; // 64 KB
    const int end = part == 0 ? min(some, steps) : steps;
#pragma unroll 1 // in part 1 the instructions are there
    for (int step = part * some; step < end; step += kStepsTogether)
#pragma unroll 1
      for (int unit = 0; unit < item.units; unit++)
        bring(item, unit, step, min(kStepsTogether, steps - step), step, &shared.guessed, 0);
  }
  __device__ __forceinline__ int guessed_steps() const {
    return min(steps_of(op.length()), Sizes::kRowStages / kStepsTogether * kStepsTogether);
  }
  // How many steps of that item are there already. Waits for its rows, wrong ones, too: then the stages are filled
  // again.
  __device__ __forceinline__ int guessed(const Item &item) const {
    const Item guessed = guessed_item<Sizes>(s, plan);
    barrier_wait(&shared.guessed, 0);
    if (guessed.expert != item.expert || guessed.unit != item.unit || guessed.units != item.units) return 0;
    for (int step = 0; step < guessed_steps(); step++)
      for (int unit = 0; unit < Sizes::kUnits; unit++)
        barrier_arrive(&shared.rows_full[step][unit]);
    return guessed_steps();
  }
  __device__ __forceinline__ void publish(const Item &item, int number) const {
    shared.items[number % kItems] = item;
    barrier_arrive(&shared.known[number % kItems]);
  }
  __device__ __forceinline__ void run() const {
    const int steps = steps_of(op.length());
    Item item = item_at<Sizes, PARTS>(blockIdx.x, shared, s, plan);
    publish(item, 0);
    int step = Op::kGuesses && plan.guesses ? guessed(item) : 0;
    // round: parity of the phase that must have ended
    int stage = step % Sizes::kRowStages, round = step < Sizes::kRowStages;
    for (int number = 1; item.units > 0; number++) {
      const int next = gridDim.x + atomicAdd(plan.taken, 1); // on its way while this item is brought
      for (; step < steps; step += kStepsTogether) {
        const int count = min(kStepsTogether, steps - step);
        int end, end_round;
        for (int unit = 0; unit < Sizes::kUnits; unit++) {
          end = stage, end_round = round;
          for (int i = 0; i < count; i++) {
            barrier_wait(&shared.rows_empty[end][unit], end_round);
            barrier_expect(&shared.rows_full[end][unit], unit < item.units ? kUnitBytes : 0);
            if (++end == Sizes::kRowStages) end = 0, end_round ^= 1;
          }
          if (unit < item.units) bring(item, unit, step, count, stage, &shared.rows_full[0][unit], Sizes::kUnits);
        }
        stage = end, round = end_round;
      }
      item = item_at<Sizes, PARTS>(next, shared, s, plan);
      publish(item, number);
      step = 0;
    }
    for (int unit = 0; unit < Sizes::kUnits; unit++) {
      barrier_wait(&shared.rows_empty[stage][unit], round);
      barrier_arrive(&shared.rows_full[stage][unit]); // that there is no item any more
    }
  }
};

// Waits until gate_up has served the expert; returns whether it has served all. Its blocks have all begun: it let
// this grid in only then.
template <class Sizes>
__device__ __forceinline__ bool meet(int expert, const TiledShared<Sizes> &shared, const wd_moe_shape &s,
                                     const TiledPlan &plan) {
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

// One thread has the columns of every step of the block's items brought; or each of kTurns warps those of its steps,
// `turn` the first of them.
template <class Sizes, class Op>
__device__ __forceinline__ void bring_columns(const Op &op, const wd_moe_shape &s, const TiledPlan &plan,
                                              const typename Op::Columns::Source &columns, TiledShared<Sizes> &shared,
                                              int turn) {
  const int steps = steps_of(op.length());
  typename Op::Columns source(columns, plan, s, shared, turn);
  bool met = plan.awaited_units == 0; // whether all columns are there
  if (plan.dependent && met) wait_for_previous_grid(), allow_copies_of_written();
  int stage = 0, round = 1; // round: parity of the phase that must have ended
  for (int number = 0;; number++) {
    barrier_wait(&shared.known[number % kItems], number / kItems % 2);
    const Item item = shared.items[number % kItems];
    if (item.units == 0) break;
    source.begin(item);
    if (!met) met = meet(item.expert, shared, s, plan);
    for (int step = 0; step < steps; step++) {
      if (turn == 0) {
        barrier_wait(&shared.columns_empty[stage], round);
        source.bring(step, stage);
        turn = Op::Columns::kTurns;
      }
      turn--;
      if (++stage == Sizes::kColumnStages) stage = 0, round ^= 1;
    }
  }
  source.end();
  if (plan.awaited_units > 0) wait_for_previous_grid(); // so that this grid's end is that one's, too
}

// Where a multiplying lane finds its rows' pieces in a stage. The boxes lie in rows of 128 bytes whose pieces are
// permuted (tensor_map.cuh): piece p of row r is at p ^ r % 8. Lanes 0 to 7 read rows that differ in bit 2 (Op::row
// sees to that), so they meet in no bank.
template <class Sizes, class Op> struct RowReader {
  uint32_t own; // the first piece of row(warp, g, first half, 0) in stage 0; the second chunk's is at ^ 64
  __device__ __forceinline__ explicit RowReader(TiledShared<Sizes> &shared) {
    const int group = threadIdx.x / kWarpgroup, warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int row = Op::row(warp, lane / 4, Sizes::kHalves == 1 ? group : 0, 0);
    own =
        shared_address(shared.rows[0][Sizes::kHalves == 1 ? 0 : group]) + row * kStepBytes + (lane % 4 ^ row % 8) * 16;
  }
  // a[half][high], of a chunk of the step. row(warp, g, half, high) is `behind` rows behind that row, and no bit of
  // row % 8 is set in both, so that ^ does what + does.
  __device__ __forceinline__ void read(uint4 (&a)[Sizes::kHalves][2], int stage, int chunk) const {
    const uint32_t here = own + stage * (Sizes::kUnits * kUnitBytes);
#pragma unroll
    for (int half = 0; half < Sizes::kHalves; half++)
#pragma unroll
      for (int high = 0; high < 2; high++) {
        const int behind = Op::row(0, 0, half, high);
        a[half][high] = load_shared((here ^ (chunk * 64 + behind % 8 * 16)) + behind * kStepBytes);
      }
  }
};

} // namespace wd
