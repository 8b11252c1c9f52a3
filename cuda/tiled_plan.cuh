// tiled_plan.cuh - the tiled schedule (tiled.cuh): its sizes, its shared memory, and which items a block serves.
#pragma once
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
  static_assert(REGISTERS > kLaunchRegisters, "the multiplying threads take registers from the producing ones");
  // what is left for a producing thread
  static constexpr int kProducerRegisters = kLaunchRegisters * (MULTIPLIERS + 1) - REGISTERS * MULTIPLIERS;
  // One matrix row of all columns. A matrix, eight of these, must not straddle 128 bytes: padded by 16 bytes, as would
  // suit the copies' banks, the call at T = 4096 was 6% slower.
  static constexpr int kMatrixBytes = COLUMNS * 16;
  static constexpr int kColumnBytes = kStep / 8 * kMatrixBytes;           // of one step
  static constexpr int kWarpBytes = 32 * kStepBytes;                      // of one step of a warp's 32 rows
  static constexpr int kRowBytes = kWarpBytes * kMultiplyingThreads / 32; // of one step of all rows
};
// Up to so many routes an expert, reading the weights is all that counts: small tiles, and deep rings for columns.
constexpr int kFewRoutes = 24;
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

// The shared memory of a block, all of it.
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

} // namespace wd
