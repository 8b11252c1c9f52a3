// tiled.cuh - the schedule for several tokens an expert (sm_90a): wgmma, rows and columns through shared memory.
//
// A block multiplies 128 rows of one expert (a unit) or two with up to COLUMNS columns; both come by themselves
// (tiled_streams.cuh). Lanes hold the same 16 bytes of a row as in common.cuh, and the columns come with their words in
// the order that wgmma then expects (columns.cuh): the same products in the same order, so the same bits.
//
// A column is a row of `length` values: a token's hidden state, or one part of a route's intermediate. An item is one
// expert, a unit for each of two warpgroups (of the last of an odd number the second multiplies for nothing) or, where
// units are few, one for both (choose_units), up to COLUMNS / PARTS routes. Blocks stay and take item after item, so
// that an item's first steps are on their way while the one before is finished; they take what is next, because
// multiprocessors differ in speed by an eighth (as many as share a path to the L2 cache). Which block computes a row
// changes no bit.
#pragma once
#include "tiled_multiply.cuh"
#include "tiled_streams.cuh"
#include <type_traits>

namespace wd {

// Where the multiplying warps and the noting one meet once an item. barrier.sync, because they come from different
// places in the code: bar.sync would promise that they do not.
__device__ __forceinline__ void meet_in_item() {
  asm volatile("barrier.sync 1, %0;" ::"n"(kMultiplyingThreads + 32) : "memory");
}

// The multiplying warps: item after item.
template <class T, class Sizes, class Op>
__device__ __forceinline__ void multiply_items(const Op &op, const TiledPlan &plan, TiledShared<Sizes> &shared) {
  const int group = threadIdx.x / kWarpgroup, warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
  Multiplier<T, Sizes, Op> multiplier(shared, chunks_of(op.length()));
  for (int number = 0;; number++) {
    const Item item = multiplier.item(number);
    if (item.units == 0) {
      meet_in_item();
      break;
    }
    const int columns = columns_for<Sizes, Op::kParts>(item.count);
    auto serve = [&](auto &c) {
      multiplier.multiply(c);
      meet_in_item();                                   // the routes have been noted
      const Item ended = shared.items[number % kItems]; // read again: registers are short in between
      const int32_t *const routes = shared.routes[number % 2];
      if constexpr (Sizes::kHalves == 2) {
        if (group < ended.units) op.finish(c, ended, ended.unit + group, warp, lane, routes);
      } else {
        float both[2][std::extent_v<std::remove_reference_t<decltype(c)>, 1>][4];
        if (join_halves(both, c[0], shared)) op.finish(both, ended, ended.unit, warp, lane, routes);
      }
    };
    if (Sizes::kColumns > 64 && columns > 64) {
      if (Sizes::kColumns > 128 && columns > 128) {
        float c[Sizes::kHalves][Sizes::kColumns > 128 ? 20 : 2][4];
        serve(c);
      } else if (columns > 96) {
        float c[Sizes::kHalves][Sizes::kColumns > 64 ? 16 : 2][4];
        serve(c);
      } else {
        float c[Sizes::kHalves][Sizes::kColumns > 64 ? 12 : 2][4];
        serve(c);
      }
    } else if (columns > 32) {
      float c[Sizes::kHalves][8][4];
      serve(c);
    } else if (columns > 16) {
      float c[Sizes::kHalves][4][4];
      serve(c);
    } else if (Op::kParts > 1 || columns > 8) {
      float c[Sizes::kHalves][2][4];
      serve(c);
    } else {
      float c[Sizes::kHalves][1][4];
      serve(c);
    }
  }
}

// The noting warp: the routes of each item, before its end; and when all warps have come to an item's end, that what
// they stored of the one before can be read by others. Not one of theirs: that takes microseconds, in which the ring
// would run full.
template <class Sizes, class Op>
__device__ __forceinline__ void note_items(const Op &op, const TiledPlan &plan, TiledShared<Sizes> &shared) {
  for (int number = 0;; number++) {
    barrier_wait(&shared.known[number % kItems], number / kItems % 2);
    const Item item = shared.items[number % kItems];
    // Whose routes were here has been finished: the multiplying warps have met once more.
    for (int i = threadIdx.x % 32; i < item.count; i += 32)
      shared.routes[number % 2][i] = __ldcg(plan.lists.routes + item.first + i);
    meet_in_item();
    if (number > 0 && threadIdx.x % 32 == 0) op.tell(shared.items[(number + kItems - 1) % kItems]);
    if (item.units == 0) break;
  }
}

// The whole block. Op says what a row, a column and a result are:
//   kParts, length()              columns of a route; values of a row and of a column
//   kBoxRows, box(unit, i)        rows of a box; the first row of a unit's box i
//   row(warp, g, half, high)      which of the unit's rows, box after box, a lane group has
//   finish(c, item, unit, warp, lane, routes)   what becomes of the dot products. Tile i of c is group i / PARTS of the
//                                 item, part i % PARTS; routes: those of the item
//   tell(item)                    this one is finished: somebody may wait for it
//   Columns                       how columns come (tiled_streams.cuh)
//   kGuesses                      whether rows come before the lists are there
template <class T, class Sizes, class Op>
__device__ __forceinline__ void tiled(const Op &op, const wd_moe_shape &s, const TiledPlan &plan, const RowMaps &rows,
                                      const typename Op::Columns::Source &columns) {
  using Columns = typename Op::Columns;
  extern __shared__ __align__(1024) uint8_t memory[];
  static_assert(sizeof(TiledShared<Sizes>) <= 227 << 10);
  TiledShared<Sizes> &shared = *(TiledShared<Sizes> *)memory;
  const RowBringer<Sizes, Op> row_bringer = {op, s, plan, rows, shared};
  const int warp = threadIdx.x / 32 - kMultiplyingThreads / 32; // of those that multiply nothing
  init_barriers(shared);
  // Twice where rows are guessed: what is behind the wait then finds its instructions there, which take as long as any
  // other way to memory while those rows come (Qwen3-30B-A3B took 264.5 us at T = 64 without, 263.7 with it).
#pragma unroll 1
  for (int part = Op::kGuesses && plan.guesses ? 0 : 1; part < 2; part++) {
    if (part == 1) {
      if (!plan.dependent) wait_for_previous_grid(), allow_copies_of_written();
      allow_next_grid();
    }
    if (Op::kGuesses && plan.guesses && warp == 0 && elected()) row_bringer.guess(part);
    place_items<Sizes, Op::kParts>(shared, s, plan, part == 1);
  }
  if (threadIdx.x < kMultiplyingThreads) {
    take_registers<Sizes::kMultiplyingRegisters>();
    multiply_items<T>(op, plan, shared);
  } else {
    give_registers<Sizes::kBringingRegisters>();
    if (warp == 0 && elected()) row_bringer.run();
    // One place in the code for both warps: Qwen3-30B-A3B took .4% longer with a copy for each.
    if (Columns::kByWarp ? warp % 2 == 1 : warp == 1 && elected())
      bring_columns<Sizes, Op>(op, s, plan, columns, shared, warp / 2);
    if (warp == 2) note_items(op, plan, shared);
  }
}

} // namespace wd
