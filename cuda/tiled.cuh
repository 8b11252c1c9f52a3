// tiled.cuh - the schedule for several tokens an expert (sm_90a): wgmma, rows and columns through shared memory.
//
// A block multiplies 128 rows of one expert (a unit) a warpgroup with up to COLUMNS columns; both come by themselves
// (tiled_streams.cuh). Lanes hold the same 16 bytes of a row as in common.cuh, and the columns come with their words in
// the order that wgmma then expects (columns.cuh): the same products in the same order, so the same bits.
//
// A column is a row of `length` values: a token's hidden state, or one part of a route's intermediate. An item is one
// expert, a unit for each warpgroup or, where units are few, one for both (choose_units), up to COLUMNS / PARTS
// routes. Blocks stay and take item after item, so that an item's first steps are on their way while the one before is
// finished; they take what is next, because multiprocessors differ in speed by an eighth (as many as share a path to
// the L2 cache). Which block computes a row changes no bit.
#pragma once
#include "tiled_streams.cuh"
#include <type_traits>

namespace wd {

// The steps of one item, as the stages come. Rows are read while products before them run: those of a step, or where
// the sums leave no room in the registers, of a chunk.
template <class T, class Sizes, class Op> struct Multiplier {
  static constexpr int kHalves = Sizes::kHalves;
  TiledShared<Sizes> &shared;
  const RowReader<Sizes, Op> rows;
  const int chunks;
  Place<Sizes::kRowStages> row_place; // of the step to read next
  Place<Sizes::kColumnStages> column_place;

  __device__ __forceinline__ Multiplier(TiledShared<Sizes> &shared, int chunks)
      : shared(shared), rows(shared), chunks(chunks) {
  }
  static __device__ __forceinline__ int unit() {
    return Sizes::kUnits == 1 ? 0 : threadIdx.x / kWarpgroup;
  }
  // The next item: it is there when the rows of its first step are.
  __device__ __forceinline__ Item item(int number) const {
    await_rows();
    return shared.items[number % kItems];
  }
  __device__ __forceinline__ void await_rows() const {
    barrier_wait(&shared.rows_full[row_place.stage()][unit()], row_place.parity());
  }
  __device__ __forceinline__ void read_chunk(uint4 (&a)[kHalves][2], int chunk) const {
    rows.read(a, row_place.stage(), chunk);
  }
  // Behind the start of products of a step's last rows: only then have they come to the registers.
  __device__ __forceinline__ void end_rows() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.rows_empty[row_place.stage()][unit()]);
    row_place.advance();
  }
  // The stage of the next step's columns, when they are there. Not between the reading of rows and their product: ptxas
  // would have all products run one by one.
  __device__ __forceinline__ int await_columns() {
    const int here = column_place.stage();
    barrier_wait(&shared.columns_full[here], column_place.parity());
    column_place.advance();
    return here;
  }
  // All of the next step; returns the stage of its columns.
  __device__ __forceinline__ int read(uint4 (&a)[2][kHalves][2]) {
    const int here = await_columns();
    await_rows();
    read_chunk(a[0], 0), read_chunk(a[1], 1);
    return here;
  }
  // Waits for the products of a step.
  __device__ __forceinline__ void end(int here) {
    wgmma_wait();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.columns_empty[here]);
  }
  template <int TILES>
  __device__ __forceinline__ void multiply_chunk(float (&c)[kHalves][TILES][4], const uint4 (&a)[kHalves][2], int here,
                                                 int chunk) {
    const uint32_t columns = shared_address(shared.columns[here]) + 4 * chunk * kMatrixBytes;
    const uint64_t first = columns_descriptor(columns, kMatrixBytes, kGroupStepBytes);
    const uint64_t second = columns_descriptor(columns + 2 * kMatrixBytes, kMatrixBytes, kGroupStepBytes);
#pragma unroll
    for (int half = 0; half < kHalves; half++)
      Wgmma<T, TILES>::multiply(c[half], a[half][0].x, a[half][1].x, a[half][0].y, a[half][1].y, first);
#pragma unroll
    for (int half = 0; half < kHalves; half++)
      Wgmma<T, TILES>::multiply(c[half], a[half][0].z, a[half][1].z, a[half][0].w, a[half][1].w, second);
  }
  // Starts products of a step's chunks [first, first + COUNT); a: their rows, here: the stage of their columns.
  template <int COUNT, int TILES>
  __device__ __forceinline__ void start(float (&c)[kHalves][TILES][4], const uint4 (&a)[2][kHalves][2], int here,
                                        int first = 0) {
    wgmma_fence();
#pragma unroll
    for (int chunk = 0; chunk < COUNT; chunk++)
      multiply_chunk(c, a[first + chunk], here, first + chunk);
    wgmma_commit();
  }
  // c[half][tile] += rows . columns
  template <int TILES> __device__ __forceinline__ void multiply_steps(float (&c)[kHalves][TILES][4]) {
    uint4 even[2][kHalves][2], odd[2][kHalves][2];
    int here = read(even), there = 0;
    int left = chunks; // of which two, or at the end one, are in the registers
    for (; left > 4; left -= 4) {
      start<2>(c, even, here), end_rows();
      there = read(odd);
      end(here);
      start<2>(c, odd, there), end_rows();
      here = read(even);
      end(there);
    }
    if (left > 2) {
      start<2>(c, even, here), end_rows();
      there = read(odd);
      end(here);
      // half a step: a product of zeros instead could turn a sum of -0 into +0
      if (left == 4)
        start<2>(c, odd, there);
      else
        start<1>(c, odd, there);
      end_rows(), end(there);
    } else {
      if (left == 2)
        start<2>(c, even, here);
      else
        start<1>(c, even, here);
      end_rows(), end(here);
    }
  }
  template <int TILES> __device__ __forceinline__ void multiply_chunks(float (&c)[kHalves][TILES][4]) {
    uint4 a[2][kHalves][2]; // of a step, its second chunk or the first one of the next
    int here = await_columns();
    await_rows();
    read_chunk(a[0], 0);
    int left = chunks;
    for (; left > 2; left -= 2) {
      start<1>(c, a, here);
      read_chunk(a[1], 1);
      wgmma_wait();
      start<1>(c, a, here, 1), end_rows();
      const int there = await_columns();
      await_rows();
      read_chunk(a[0], 0);
      end(here);
      here = there;
    }
    start<1>(c, a, here);
    if (left == 2) {
      read_chunk(a[1], 1);
      wgmma_wait();
      start<1>(c, a, here, 1);
    }
    end_rows(), end(here);
  }
  // c[half][tile] = rows . columns
  template <int TILES> __device__ __forceinline__ void multiply(float (&c)[kHalves][TILES][4]) {
#pragma unroll
    for (int half = 0; half < kHalves; half++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          c[half][tile][i] = 0.0f;
    if constexpr (kHalves * TILES > 32) {
      wgmma_results(c); // zeros now, not between products: ptxas would have them run one by one
      multiply_chunks(c);
    } else {
      multiply_steps(c);
    }
    wgmma_results(c);
  }
};

// Where the multiplying warps and the noting one meet once an item. barrier.sync, because they come from different
// places in the code: bar.sync would promise that they do not.
__device__ __forceinline__ void meet_in_item() {
  asm volatile("barrier.sync 1, %0;" ::"n"(kMultiplyingThreads + 32) : "memory");
}

// One unit alone: the sums of both halves of its rows, for the first warpgroup; for the other false. Behind
// meet_in_item(), to which the first one comes only when it has read those of the item before.
template <class Sizes, int TILES>
__device__ __forceinline__ bool join_halves(float (&both)[2][TILES][4], const float (&own)[TILES][4],
                                            TiledShared<Sizes> &shared) {
  const bool first = threadIdx.x < kWarpgroup;
  const auto place = [&](int tile) { return &shared.joined[tile * kWarpgroup + threadIdx.x % kWarpgroup]; };
#pragma unroll
  for (int tile = 0; tile < TILES && !first; tile++)
    *place(tile) = make_float4(own[tile][0], own[tile][1], own[tile][2], own[tile][3]);
  asm volatile("barrier.sync 2, %0;" ::"n"(kMultiplyingThreads) : "memory");
#pragma unroll
  for (int tile = 0; tile < TILES && first; tile++) {
    const float4 other = *place(tile);
    both[1][tile][0] = other.x, both[1][tile][1] = other.y, both[1][tile][2] = other.z, both[1][tile][3] = other.w;
#pragma unroll
    for (int i = 0; i < 4; i++)
      both[0][tile][i] = own[tile][i];
  }
  return first;
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
    if (warp == 1 && (Columns::kByWarp || elected())) bring_columns<Sizes, Op>(op, s, plan, columns, shared);
    if (warp == 2) note_items(op, plan, shared);
  }
}

} // namespace wd
