// tiled.cuh - the schedule for several tokens an expert (sm_90a): wgmma, weights and tokens through shared memory.
//
// A block multiplies 128 rows of one expert (a unit) a warpgroup with up to COLUMNS columns; four producer warps bring
// the columns, the multiplying lanes their own weights. Lanes hold the same 16 bytes of a row as in common.cuh, and the
// producers lay the columns' words down in the order that wgmma then expects: the same products in the same order,
// so the same bits.
//
// A column is a row of `length` values: a token's hidden state, or one part of a route's intermediate. An item is one
// expert, a unit for each multiplying warpgroup, up to COLUMNS / PARTS routes; the grid has a block an item. Blocks
// that stay and walk over items were no faster: multiprocessors differ in speed by an eighth (as many as share a path
// to the L2 cache), and only the hardware's queue evens that out.
#pragma once
#include "arrange.cuh"
#include "copies.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "routes.cuh"
#include "wgmma.cuh"

namespace wd {

constexpr int kWarpgroup = 128, kUnitRows = 128;
constexpr int kTiledMaxExperts = WD_CUDA_TILED_MAX_EXPERTS;

// The sizes of a kernel. MULTIPLIERS: warpgroups that multiply. COLUMNS: at a time. PRODUCERS: warps that bring
// columns, each a part of every step. WEIGHTS_AHEAD, COLUMNS_AHEAD: steps of weights and of columns on their way or
// ready. REGISTERS: of a multiplying thread.
template <int MULTIPLIERS, int COLUMNS, int PRODUCERS, int WEIGHTS_AHEAD, int COLUMNS_AHEAD, int REGISTERS>
struct TiledSizes {
  static constexpr int kMultipliers = MULTIPLIERS, kColumns = COLUMNS, kProducers = PRODUCERS,
                       kWeightsAhead = WEIGHTS_AHEAD, kStages = COLUMNS_AHEAD, kRegisters = REGISTERS;
  static constexpr int kMultiplyingThreads = kWarpgroup * MULTIPLIERS;
  static constexpr int kThreads = kMultiplyingThreads + 32 * PRODUCERS;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr bool kMovesRegisters = REGISTERS > kLaunchRegisters;
  // what is left for a producing thread
  static constexpr int kProducerRegisters = kLaunchRegisters * (MULTIPLIERS + 1) - REGISTERS * MULTIPLIERS;
  // One matrix row of all columns. A matrix, eight of these, must not straddle 128 bytes: padded by 16 bytes, as would
  // suit the copies' banks, the call at T = 4096 was 6% slower.
  static constexpr int kMatrixBytes = COLUMNS * 16;
  static constexpr int kColumnBytes = kStep / 8 * kMatrixBytes;           // of one step
  static constexpr int kWarpBytes = 32 * kStepBytes;                      // of one step of a warp's 32 rows
  static constexpr int kRowBytes = kWarpBytes * kMultiplyingThreads / 32; // of one step of all rows
};
using FewRoutes = TiledSizes<2, 64, 4, 4, 6, 208>;
using ManyRoutes = TiledSizes<2, 128, 4, 4, 4, 232>;

// What the items of a call are cut from.
struct TiledPlan {
  int units;        // of an expert
  RouteLists lists; // of sort_routes
  bool dependent;   // the columns come from the grid before, which may still run; else the lists do
};

struct Item {
  int expert, unit, units, first, count; // routes [first, first + count) of the expert's list
};

__device__ __forceinline__ int steps_of(int length) {
  return (length + kStep - 1) / kStep;
}

// A block's shared memory: one of it, dynamic.
template <class Sizes> struct TiledShared {
  alignas(1024) uint8_t weights[Sizes::kWeightsAhead][Sizes::kRowBytes];
  uint8_t columns[Sizes::kStages][Sizes::kColumnBytes];
  uint64_t full[Sizes::kStages], empty[Sizes::kStages], routes_free[2];
  int32_t before[kTiledMaxExperts + 1];  // items of the experts before
  int32_t offsets[kTiledMaxExperts + 1]; // of the lists
  int32_t routes[2][Sizes::kColumns];    // of the item, by parity of its number
  int32_t rows[2][Sizes::kColumns];      // of each column: which row of the source, -1 for none
};

// Barrier of the producer warps alone.
template <class Sizes> __device__ __forceinline__ void producers_meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * Sizes::kProducers) : "memory");
}

// All threads: barriers, and the places of the experts' items.
template <class Sizes, int ROUTES>
__device__ __forceinline__ void prepare(TiledShared<Sizes> &shared, const wd_moe_shape &s, const TiledPlan &plan) {
  const int thread = threadIdx.x;
  constexpr int arrivals = Sizes::kMultiplyingThreads / 32;
  if (thread >= 32 && thread < 32 + Sizes::kStages) {
    barrier_init(&shared.full[thread - 32], 32 * Sizes::kProducers);
    barrier_init(&shared.empty[thread - 32], arrivals);
  }
  if (thread >= 64 && thread < 66) barrier_init(&shared.routes_free[thread - 64], arrivals);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  if (thread < 32) {
    const int granules = (plan.units + Sizes::kMultipliers - 1) / Sizes::kMultipliers;
    int total = 0;
    for (int base = 0; base < s.experts; base += 32) {
      const int e = base + thread;
      int own = 0;
      if (e < s.experts) {
        shared.offsets[e] = plan.lists.offsets[e];
        own = (plan.lists.offsets[e + 1] - shared.offsets[e] + ROUTES - 1) / ROUTES * granules;
      }
      int sum = own;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, sum, distance);
        if (thread >= distance) sum += other;
      }
      if (e < s.experts) shared.before[e] = total + sum - own;
      total += __shfl_sync(~0u, sum, 31);
    }
    if (thread == 0) shared.before[s.experts] = total, shared.offsets[s.experts] = plan.lists.offsets[s.experts];
  }
  __syncthreads();
}

// This block's items, one after another; every thread walks the same way.
template <class Sizes, int ROUTES> struct Walk {
  const TiledShared<Sizes> &shared;
  const TiledPlan &plan;
  int experts, position;

  __device__ __forceinline__ Walk(const TiledShared<Sizes> &shared, const TiledPlan &plan, int experts)
      : shared(shared), plan(plan), experts(experts), position(blockIdx.x) {
  }
  __device__ __forceinline__ bool next(Item *item) {
    if (position >= shared.before[experts]) return false;
    int low = 0, high = experts; // before[low] <= position < before[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (shared.before[middle] <= position)
        low = middle;
      else
        high = middle;
    }
    // An expert's routes in equal parts: a last part of a few routes would read all its weights for them.
    const int local = position - shared.before[low], first = shared.offsets[low];
    const int count = shared.offsets[low + 1] - first, tiles = (count + ROUTES - 1) / ROUTES;
    const int tile = local % tiles, share = (count + tiles - 1) / tiles; // neighbours share weights, in L2 at once
    item->expert = low;
    item->unit = local / tiles * Sizes::kMultipliers;
    item->units = min(Sizes::kMultipliers, plan.units - item->unit);
    item->first = first + tile * share;
    item->count = min(share, count - tile * share);
    position += gridDim.x;
    return true;
  }
};

// Columns of the products that serve `count` routes, PARTS columns a route.
template <class Sizes, int PARTS> __device__ __forceinline__ int columns_for(int count) {
  const int columns = PARTS * ((count + 7) / 8 * 8);
  if (columns <= 32) return columns <= 8 ? 8 : columns <= 16 ? 16 : 32;
  if (Sizes::kColumns <= 64 || columns <= 64) return 64;
  return columns <= 96 ? 96 : 128;
}

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
        const uint32_t place = target + stage * Sizes::kColumnBytes + column * 16;
        const T *p = source + (int64_t)max(row, 0) * pitch + step * kStep;
        copy_ahead(place, p, row >= 0);
        copy_ahead(place + 4 * Sizes::kMatrixBytes, p + kChunk, row >= 0 && both);
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
//   weights()                           the first expert's
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
    if (Sizes::kMovesRegisters) give_registers<Sizes::kProducerRegisters>();
    produce<T>(op, s, plan, shared);
    return;
  }
  if (Sizes::kMovesRegisters) take_registers<Sizes::kRegisters>();
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
