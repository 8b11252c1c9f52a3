// tiled_streams.cuh - the tiled schedule (tiled.cuh): how rows and columns come into shared memory, and rows out of it.
#pragma once
#include "tiled_plan.cuh"

namespace wd {

// Columns that lie in memory as matrices (down): boxes, which the tensor memory accelerator brings. One lane.
template <class Sizes, int PARTS> struct BoxedColumns {
  using Source = CUtensorMap;
  static constexpr int kArrivals = 0; // of full barriers, beside the one that says how many bytes come
  static constexpr bool kByWarp = false;
  const CUtensorMap &map;
  TiledShared<Sizes> &shared;
  int first, boxes;

  __device__ __forceinline__ BoxedColumns(const Source &map, const TiledPlan &, const wd_moe_shape &,
                                          TiledShared<Sizes> &shared)
      : map(map), shared(shared) {
  }
  __device__ __forceinline__ void begin(const Item &item) {
    first = item.group * PARTS;
    boxes = ((item.count + kGroup - 1) / kGroup * PARTS + Sizes::kBox - 1) / Sizes::kBox;
  }
  // Bytes of a step that its full barrier hears of.
  __device__ __forceinline__ int bytes() const {
    return boxes * Sizes::kBox * kGroupStepBytes;
  }
  __device__ __forceinline__ void bring(int step, int stage) {
    for (int box = 0; box < boxes; box++)
      copy_columns(shared.columns[stage][box * Sizes::kBox], map, step * (kStep / 8), first + box * Sizes::kBox,
                   &shared.full[stage]);
  }
  __device__ __forceinline__ void end(int) {
  }
};

// Columns that are tokens (gate_up), put into matrices on their way: 16 bytes at a time, by all lanes of a warp. A step
// is told of when kBehind more have been asked for, so that many are on their way.
template <class Sizes> struct TokenColumns {
  using Source = const void *;
  static constexpr int kArrivals = 1, kBehind = 2;
  static constexpr bool kByWarp = true;
  // Multiplying warps wait for a step before they give the one before it back: with one stage less they would wait for
  // what is told of only when that stage has been filled again.
  static_assert(kBehind + 2 <= Sizes::kStages);
  const RouteLists &lists;
  TiledShared<Sizes> &shared;
  const uint4 *const source; // this lane's word of token 0, in chunk 0
  const int top_k, chunks;
  int count, asked; // routes; steps that are not told of

  __device__ __forceinline__ TokenColumns(Source tokens, const TiledPlan &plan, const wd_moe_shape &s,
                                          TiledShared<Sizes> &shared)
      : lists(plan.lists), shared(shared), source((const uint4 *)tokens + threadIdx.x % 32 / kGroup), top_k(s.top_k),
        chunks(chunks_of(s.hidden)), asked(0) {
  }
  __device__ __forceinline__ void begin(const Item &item) {
    count = item.count;
    __syncwarp(); // the last item's places have been read
    for (int i = threadIdx.x % 32; i < count; i += 32)
      shared.tokens[i] = __ldcg(lists.routes + item.first + i) / top_k * (4 * chunks);
    __syncwarp();
  }
  __device__ __forceinline__ int bytes() const {
    return 0;
  }
  __device__ __forceinline__ void bring(int step, int stage) {
    const int lane = threadIdx.x % 32;
    uint32_t to = shared_address(shared.columns[stage]) + lane / kGroup * kMatrixBytes + lane % kGroup * 16;
    const uint4 *const from = source + step * 8;
    const bool whole = 2 * step + 1 < chunks;
#pragma unroll 4
    for (int i = lane % kGroup; i - lane % kGroup < count; i += kGroup, to += kGroupStepBytes) {
      const bool valid = i < count; // else zeros: they fill a group
      const uint4 *const token = from + (valid ? shared.tokens[i] : 0);
      copy_ahead(to, token, valid);
      copy_ahead_if(whole, to + 4 * kMatrixBytes, token + 4, valid);
    }
    close_copies();
    if (++asked <= kBehind) return;
    await_copies<kBehind>();
    tell(stage - kBehind);
  }
  // After the last step, which came to the stage before this one.
  __device__ __forceinline__ void end(int stage) {
    await_copies<0>();
    while (asked > 0)
      tell(stage - asked);
  }
  // That a step is there: wgmma reads past what orders other accesses.
  __device__ __forceinline__ void tell(int stage) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.full[stage < 0 ? stage + Sizes::kStages : stage]);
    asked--;
  }
};

// One thread, or warp, takes the items of its block, and has every step of each brought. Op: see tiled().
template <class Sizes, class Op> struct Bringer {
  using Columns = typename Op::Columns;
  static constexpr int PARTS = Op::kParts, BOXES = kUnitRows / Op::kBoxRows;
  const Op &op;
  const wd_moe_shape &s;
  const TiledPlan &plan;
  const RowMaps &rows;
  const typename Columns::Source &columns;
  TiledShared<Sizes> &shared;

  // Of a warp, who asks for boxes and has barriers expect them.
  static __device__ __forceinline__ bool asks() {
    return !Columns::kByWarp || elected();
  }
  __device__ __forceinline__ void bring_rows(const Item &item, int step, int stage, uint64_t *barrier) const {
    for (int unit = 0; unit < item.units; unit++)
#pragma unroll
      for (int box = 0; box < BOXES; box++)
        copy_rows(shared.rows[stage][unit] + box * Op::kBoxRows * kStepBytes, rows.box[box], step * kStep,
                  item.expert * plan.expert_rows + op.box(item.unit + unit, box), barrier, item.policy);
  }
  // Before the grid before has ended, which makes the lists: the first steps of the item that the block probably has.
  // One thread.
  __device__ __forceinline__ void guess() const {
    barrier_init(&shared.guessed, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const Item item = guessed_item(s, plan);
    const int steps = min(steps_of(op.length()), Sizes::kStages);
    barrier_expect(&shared.guessed, item.units * steps * kUnitBytes);
    for (int step = 0; step < steps; step++)
      bring_rows(item, step, step, &shared.guessed);
  }
  // Whether that is the item. Waits for its rows, wrong ones, too: then the stages are filled again.
  __device__ __forceinline__ bool guessed(const Item &item) const {
    const Item guessed = guessed_item(s, plan);
    barrier_wait(&shared.guessed, 0);
    return guessed.expert == item.expert && guessed.unit == item.unit && guessed.units == item.units;
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
    const bool first = !Columns::kByWarp || threadIdx.x % 32 == 0;
    const int steps = steps_of(op.length());
    Columns source(columns, plan, s, shared);
    Item item = item_at<Sizes, PARTS>(blockIdx.x, shared, s, plan);
    // steps whose rows come before the grid before has ended
    int early = item.units > 0 ? min(steps, Sizes::kStages) : 0;
    if (Op::kGuesses && plan.guesses) {
      if (!guessed(item)) early = 0;
    } else if (asks()) {
      for (int step = 0; step < early; step++) {
        barrier_promise(&shared.full[step], item.units * kUnitBytes);
        bring_rows(item, step, step, &shared.full[step]);
      }
    }
    bool met = plan.awaited_units == 0; // whether all columns are there
    if (plan.dependent && met) wait_for_previous_grid(), allow_copies_of_written();
    int stage = 0, round = 1; // round: parity of the phase that must have ended
    for (int number = 0;; number++) {
      if (first) shared.items[number % kItems] = item;
      if (item.units == 0) break;
      int next = first ? gridDim.x + atomicAdd(plan.taken, 1) : 0; // on its way while this item is brought
      source.begin(item);
      for (int step = 0; step < steps; step++) {
        barrier_wait(&shared.empty[stage], round);
        if (early > 0) {
          early--;
          if (asks()) barrier_expect(&shared.full[stage], source.bytes());
        } else if (asks()) {
          barrier_expect(&shared.full[stage], source.bytes() + item.units * kUnitBytes);
          bring_rows(item, step, stage, &shared.full[stage]);
        }
        if (step == 0 && !met) met = meet(item.expert);
        source.bring(step, stage);
        if (++stage == Sizes::kStages) stage = 0, round ^= 1;
      }
      if (Columns::kByWarp) next = __shfl_sync(~0u, next, 0);
      item = item_at<Sizes, PARTS>(next, shared, s, plan);
    }
    source.end(stage);
    if (plan.awaited_units > 0) wait_for_previous_grid(); // so that this grid's end is that one's, too
    barrier_wait(&shared.empty[stage], round);
    if (asks()) barrier_expect(&shared.full[stage], 0); // that there is no item any more
    if (Columns::kArrivals > 0 && first) barrier_arrive(&shared.full[stage]);
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
