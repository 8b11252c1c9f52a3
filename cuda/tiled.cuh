// tiled.cuh - the schedule for several tokens an expert (sm_90a): wgmma, weights and tokens through shared memory.
//
// A block multiplies 128 rows of one expert (a unit) a warpgroup with up to COLUMNS columns; four producer warps bring
// the columns, the multiplying warps their own weights. Lanes hold the same 16 bytes of a row as in common.cuh, and the
// columns come with their words in the order that wgmma then expects (arrange.cuh): the same products in the same
// order, so the same bits.
//
// A column is a row of `length` values: a token's hidden state, or one part of a route's intermediate. An item is one
// expert, a unit for each multiplying warpgroup, up to COLUMNS / PARTS routes; the grid has a block an item. Blocks
// that stay and walk over several items, as the code still can, were no faster: multiprocessors differ in speed by an
// eighth (as many as share a path to the L2 cache), and only the hardware's queue evens that out.
#pragma once
#include "tiled_streams.cuh"

namespace wd {

// One item: c[half][tile] = rows . columns, as the stages come.
template <class T, class Sizes, int TILES, class Stream>
__device__ __forceinline__ void multiply(float (&c)[2][TILES][4], Stream &weights, TiledShared<Sizes> &shared,
                                         int chunks, int &stage, int &round) {
  const uint32_t base = shared_address(shared.columns);
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        c[half][tile][i] = 0.0f;
  auto product = [&](auto present) {
    uint4 a[2][2][2];
    weights.take(a);
    barrier_wait(&shared.full[stage], round);
    fence_for_wgmma();
    wgmma_fence();
#pragma unroll
    for (int chunk = 0; chunk < present; chunk++) {
      const uint32_t columns = base + stage * Sizes::kColumnBytes + 4 * chunk * Sizes::kMatrixBytes;
      const uint64_t first = columns_descriptor(columns, Sizes::kMatrixBytes);
      const uint64_t second = columns_descriptor(columns + 2 * Sizes::kMatrixBytes, Sizes::kMatrixBytes);
      const auto &w = a[chunk];
#pragma unroll
      for (int half = 0; half < 2; half++)
        Wgmma<T, TILES>::multiply(c[half], w[half][0].x, w[half][1].x, w[half][0].y, w[half][1].y, first);
#pragma unroll
      for (int half = 0; half < 2; half++)
        Wgmma<T, TILES>::multiply(c[half], w[half][0].z, w[half][1].z, w[half][0].w, w[half][1].w, second);
    }
    wgmma_commit();
    weights.load(); // while the products run: take() has emptied the slot
    wgmma_wait();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.empty[stage]);
    if (++stage == Sizes::kStages) stage = 0, round ^= 1;
  };
  for (int step = 0; step < chunks / 2; step++)
    product(Constant<2>());
  // half a step: a product of zeros instead could turn a sum of -0 into +0
  if (chunks % 2 != 0) product(Constant<1>());
}

// The whole block. Op says what a row, a column and a result are:
//   kParts                              columns of a route
//   length()                            values of a row and of a column
//   columns(), column_row(route, part)  where arranged columns lie
//   half_stride(), high_stride(), four_groups()   to the other half's row, to the high row, to lane group g + 4's
//   row(expert, unit, warp, g), exists(unit, warp, g)   the low row of half 0 of a lane group; whether it is one
//   finish(c, unit, warp, lane, routes, count)   what becomes of the dot products
template <class T, class Sizes, class Op>
__device__ __forceinline__ void tiled(const Op &op, const wd_moe_shape &s, const TiledPlan &plan) {
  extern __shared__ __align__(1024) uint8_t memory[];
  TiledShared<Sizes> &shared = *(TiledShared<Sizes> *)memory;
  constexpr int ROUTES = Sizes::kColumns / Op::kParts;
  if (!plan.dependent) wait_for_previous_grid();
  allow_next_grid();
  prepare<Sizes, ROUTES>(shared, s, plan);
  if (threadIdx.x >= Sizes::kMultiplyingThreads) {
    give_registers<Sizes::kProducerRegisters>();
    produce<T>(op, s, plan, shared);
    return;
  }
  take_registers<Sizes::kRegisters>();
  const int group = threadIdx.x / kWarpgroup, warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
  const int chunks = chunks_of(op.length());
  Walk<Sizes, ROUTES> walk(shared, plan, s.experts);
  WeightStream<T, Sizes, Op> weights(op, walk, shared);
  Item item;
  int stage = 0, round = 0; // of the columns' ring; the parity of the phase to wait for
  for (int number = 0; walk.next(&item); number++) {
    const int columns = columns_for<Sizes, Op::kParts>(item.count), place = number % 2;
    auto serve = [&](auto &c) {
      multiply<T>(c, weights, shared, chunks, stage, round);
      if (group < item.units) op.finish(c, item.unit + group, warp, lane, shared.routes[place], item.count);
    };
    if (Sizes::kColumns > 64 && columns > 64) {
      if (columns > 96) {
        float c[2][Sizes::kColumns > 64 ? 16 : 1][4];
        serve(c);
      } else {
        float c[2][Sizes::kColumns > 64 ? 12 : 1][4];
        serve(c);
      }
    } else if (columns > 32) {
      float c[2][8][4];
      serve(c);
    } else if (columns > 16) {
      float c[2][4][4];
      serve(c);
    } else if (Op::kParts > 1 || columns > 8) {
      float c[2][2][4];
      serve(c);
    } else {
      float c[2][1][4];
      serve(c);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.routes_free[place]);
  }
}

// A block an item: at most as many as when every expert has a last, partly filled list.
template <class Sizes> dim3 tiled_grid(const wd_moe_shape &s, int units, int routes_per_item) {
  const int64_t routes = s.tokens * s.top_k, lists = routes < s.experts ? routes : s.experts;
  return dim3((unsigned)((units + Sizes::kMultipliers - 1) / Sizes::kMultipliers * (lists + routes / routes_per_item)));
}

} // namespace wd
