// tiled_plan.cuh - the tiled schedule (tiled.cuh): its sizes, its shared memory, and which items a block serves.
#pragma once
#include "columns.cuh"
#include "device.cuh"
#include "kept.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace wd {

constexpr int kWarpgroup = 128, kUnitRows = 128;
constexpr int kUnits = 2; // of a block: a warpgroup multiplies one
constexpr int kMultiplyingThreads = kUnits * kWarpgroup;
// One more warpgroup, of which one warp has everything brought, and gate_up's second warp tells what is finished:
// registers change hands between warpgroups.
constexpr int kTiledThreads = kMultiplyingThreads + kWarpgroup;
constexpr int kUnitBytes = kUnitRows * kStepBytes;        // of a step of a unit's rows
constexpr int kGroupStepBytes = kStep / 8 * kMatrixBytes; // of a step of a group of columns
constexpr int kTiledMaxExperts = WD_CUDA_TILED_MAX_EXPERTS;

// COLUMNS: at a time. STAGES: steps of rows and columns on their way or ready. BOX: groups of columns brought at once.
template <int COLUMNS, int STAGES, int BOX> struct TiledSizes {
  static constexpr int kColumns = COLUMNS, kStages = STAGES, kBox = BOX;
  // Of an item that has not all of its expert's routes: more columns take longer, and save a second reading of the rows
  // only where they are all.
  static constexpr int kPartColumns = COLUMNS < 128 ? COLUMNS : 128;
  // Of a multiplying thread, and of one that brings or tells.
  static constexpr int kMultiplyingRegisters = COLUMNS > 128 ? 240 : COLUMNS > 64 ? 224 : 160;
  static constexpr int kBringingRegisters = COLUMNS > 128 ? 24 : 56;
  // For __launch_bounds__: how many threads would take all registers. Few columns leave a quarter of them to the grid
  // before, beside which a block then begins.
  static constexpr int kBoundThreads = COLUMNS > 64 ? kTiledThreads : 512;
  static_assert(kUnits * kMultiplyingRegisters + kBringingRegisters <= 3 * (65536 / kBoundThreads / 8 * 8));
};
using FewRoutes = TiledSizes<64, 5, 2>;
using ManyRoutes = TiledSizes<128, 4, 4>;
// For down, where a route has two columns, up to so many: Mixtral-8x7B has 64 +- 7 routes an expert at T = 256, and
// with 64 at a time half of its experts were read twice (835 us, 736 so). At 80 on average half of the experts have
// more than fit here, too, and it takes 4% longer.
constexpr int kSomeRoutes = 72;
using SomeRoutes = TiledSizes<160, 4, 4>;

// What the items of a call are cut from.
struct TiledPlan {
  int units;        // of an expert
  int together;     // units of an item: kUnits, or 1 where there can only be fewer items than multiprocessors
  int expert_rows;  // from an expert's first row to the next one's, in the matrices that the boxes come from
  RouteLists lists; // of sort_routes
  int32_t *taken;   // how many items blocks have taken, beside a first one each
  bool dependent;   // the columns come from the grid before, which may still run; else the lists do
  bool guesses;     // each block's first item, before there are lists
  // The units of gate_up for each so many routes of an expert: down waits for those of the experts that it serves. 0
  // units: it waits for the end of the grid.
  int awaited_units, awaited_routes;
};

// Routes [first, first + count) of the expert's list, whose columns begin at `group`; units of rows from `unit` on.
// policy: what becomes of the rows in L2. units == 0: no item.
struct Item {
  int expert, unit, units, first, count, group;
  uint64_t policy;
};
constexpr int kItems = 16; // places for items: the bringing thread is ahead of the telling warp by the stages and two

__device__ __forceinline__ int steps_of(int length) {
  return (length + kStep - 1) / kStep;
}

// The shared memory of a block, all of it.
template <class Sizes> struct TiledShared {
  alignas(1024) uint8_t rows[Sizes::kStages][kUnits][kUnitBytes];
  uint8_t columns[Sizes::kStages][Sizes::kColumns / kGroup][kGroupStepBytes];
  uint64_t full[Sizes::kStages], empty[Sizes::kStages];
  alignas(16) Item items[kItems]; // for the other warps: there when the item's first step is. Read 16 bytes at a time
  uint64_t guessed;               // a barrier: of the rows of a guessed item's first steps
  int32_t before[kTiledMaxExperts + 1];  // items of the experts before
  int32_t offsets[kTiledMaxExperts + 1]; // of the lists
  int32_t routes[2][Sizes::kColumns];    // of the item, by parity of its number
  int32_t tokens[Sizes::kColumns];       // of the item that is brought: where they lie (TokenColumns)
  int32_t awaited;                       // units of gate_up, of all experts
};

// Items that share an expert's rows, by its routes, PARTS columns a route.
template <class Sizes, int PARTS> __device__ __forceinline__ int tiles_of(int routes) {
  constexpr int all = Sizes::kColumns / PARTS, part = Sizes::kPartColumns / PARTS;
  return all > part && routes <= all ? routes > 0 : (routes + part - 1) / part;
}
// Units of gate_up that an expert with so many routes has.
__device__ __forceinline__ int awaited_of(int routes, const TiledPlan &plan) {
  return plan.awaited_units ? (routes + plan.awaited_routes - 1) / plan.awaited_routes * plan.awaited_units : 0;
}

// All threads: barriers (arrivals: of the full ones), and the places of the experts' items. Lists are read past L1:
// where they are read before the grid before has ended, nothing else says that L1 has not those of an earlier call.
template <class Sizes, int PARTS>
__device__ __forceinline__ void prepare(TiledShared<Sizes> &shared, const wd_moe_shape &s, const TiledPlan &plan,
                                        int arrivals) {
  const int thread = threadIdx.x;
  if (thread >= 32 && thread < 32 + Sizes::kStages) {
    barrier_init(&shared.full[thread - 32], arrivals);
    barrier_init(&shared.empty[thread - 32], kMultiplyingThreads / 32);
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  for (int e = thread; e <= s.experts; e += kTiledThreads)
    shared.offsets[e] = __ldcg(plan.lists.offsets + e);
  __syncthreads();
  if (thread < 32) {
    const int blocks = (plan.units + plan.together - 1) / plan.together;
    int total = 0, awaited = 0;
    for (int base = 0; base < s.experts; base += 32) {
      const int e = base + thread;
      const int count = e < s.experts ? shared.offsets[e + 1] - shared.offsets[e] : 0;
      const int own = tiles_of<Sizes, PARTS>(count) * blocks;
      awaited += awaited_of(count, plan);
      int sum = own;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, sum, distance);
        if (thread >= distance) sum += other;
      }
      if (e < s.experts) shared.before[e] = total + sum - own;
      total += __shfl_sync(~0u, sum, 31);
    }
    awaited = __reduce_add_sync(~0u, awaited);
    if (thread == 0) shared.before[s.experts] = total, shared.awaited = awaited;
  }
  __syncthreads();
}

// The rows of the item at the block's position, were every expert served at once.
__device__ __forceinline__ Item guessed_item(const wd_moe_shape &s, const TiledPlan &plan) {
  const int blocks = (plan.units + plan.together - 1) / plan.together;
  Item item = {};
  item.expert = blockIdx.x / blocks;
  item.unit = blockIdx.x % blocks * plan.together;
  if (item.expert < s.experts) item.units = min(plan.together, plan.units - item.unit);
  item.policy = s.kept ? policy_for_once() : 0;
  return item;
}

// The item at `position`.
template <class Sizes, int PARTS>
__device__ __forceinline__ Item item_at(int position, const TiledShared<Sizes> &shared, const wd_moe_shape &s,
                                        const TiledPlan &plan) {
  Item item = {};
  if (position >= shared.before[s.experts]) return item;
  int low = 0, high = s.experts; // before[low] <= position < before[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (shared.before[middle] <= position)
      low = middle;
    else
      high = middle;
  }
  // An expert's routes in equal parts, of whole groups: a last part of a few routes would read all its rows for them.
  const int local = position - shared.before[low], offset = shared.offsets[low];
  const int count = shared.offsets[low + 1] - offset, tiles = tiles_of<Sizes, PARTS>(count);
  const int share = ((count + tiles - 1) / tiles + kGroup - 1) / kGroup * kGroup;
  const int tile = local % tiles; // neighbours share rows, in L2 at once
  item.expert = low;
  item.unit = local / tiles * plan.together;
  item.units = min(plan.together, plan.units - item.unit);
  item.policy = !s.kept ? 0 : tiles == 1 ? policy_for_once() : policy_as_usual();
  item.first = offset + tile * share;
  item.count = min(share, count - tile * share);
  item.group = first_group(offset, low, s) + tile * share / kGroup;
  return item;
}

// Columns of the products that serve `count` routes, PARTS columns a route.
template <class Sizes, int PARTS> __device__ __forceinline__ int columns_for(int count) {
  const int columns = PARTS * ((count + kGroup - 1) / kGroup * kGroup);
  if (columns <= 32) return columns <= 8 ? 8 : columns <= 16 ? 16 : 32;
  if (Sizes::kColumns <= 64 || columns <= 64) return 64;
  return columns <= 96 ? 96 : columns <= 128 ? 128 : 160;
}

// Blocks that stay and take item after item; fewer where there cannot be as many items. Where that would be few, an
// item has one unit, so that twice as many blocks read.
inline wd_status tiled_grid(dim3 *grid, TiledPlan *plan, const wd_moe_shape &s, int routes_per_item) {
  int resident;
  WD_TRY(multiprocessors(&resident));
  const int64_t routes = s.tokens * s.top_k, lists = routes < s.experts ? routes : s.experts;
  const auto items = [&](int together) {
    return (plan->units + together - 1) / together * (lists + routes / routes_per_item);
  };
  plan->together = items(kUnits) < resident ? 1 : kUnits;
  const int64_t most = items(plan->together);
  *grid = dim3((unsigned)(most < resident ? most : resident));
  return WD_OK;
}

} // namespace wd
