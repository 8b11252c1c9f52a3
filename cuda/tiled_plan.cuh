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
constexpr int kWarpgroups = 2; // that multiply
constexpr int kMultiplyingThreads = kWarpgroups * kWarpgroup;
// One more warpgroup, since registers change hands between warpgroups: a warp has rows brought, one or two bring
// columns, and one notes what the items are.
constexpr int kTiledThreads = kMultiplyingThreads + kWarpgroup;
constexpr int kUnitBytes = kUnitRows * kStepBytes;        // of a step of a unit's rows
constexpr int kGroupStepBytes = kStep / 8 * kMatrixBytes; // of a step of a group of columns
constexpr int kTiledMaxExperts = WD_CUDA_TILED_MAX_EXPERTS;

// Steps of rows that are asked for together: 256 bytes of each, which memory gives sooner than twice 128 (a kernel that
// does nothing else reads GLM-4.5-Air's gate and up rows at .976 of the speed of a plain read, .955 one step at a
// time).
constexpr int kStepsTogether = 2;

// Bytes of shared memory for rows, columns and sums; TiledShared has some more, and must not pass 227 KB.
constexpr int kRoom = 220 << 10;

// COLUMNS: at a time. COLUMN_STAGES: steps of columns on their way or ready. BOX: groups of columns brought at once.
// UNITS: of an item. A warpgroup multiplies one; of one alone each warpgroup multiplies half of the rows (row(.., half,
// ..) of Op), since a step takes as long as a warpgroup reads and multiplies it.
template <int COLUMNS, int COLUMN_STAGES, int BOX, int UNITS = kWarpgroups> struct TiledSizes {
  static constexpr int kColumns = COLUMNS, kColumnStages = COLUMN_STAGES, kBox = BOX, kUnits = UNITS;
  using OfOneUnit = TiledSizes<COLUMNS, COLUMN_STAGES, BOX, 1>;
  // Of a unit's rows (each half 64 of the 128), a warpgroup's.
  static constexpr int kHalves = 2 * UNITS / kWarpgroups;
  // Tiles of columns (8) whose sums go from one warpgroup to the other.
  static constexpr int kJoinedTiles = kHalves == 1 ? COLUMNS / 8 : 0;
  // Steps of rows on their way or ready: as many as there is room for.
  static constexpr int kRowStages =
      (kRoom - COLUMN_STAGES * COLUMNS / kGroup * kGroupStepBytes - kJoinedTiles * kWarpgroup * (int)sizeof(float4)) /
      (UNITS * kUnitBytes);
  // Of an item that has not all of its expert's routes: more columns take longer, and save a second reading of the rows
  // only where they are all.
  static constexpr int kPartColumns = COLUMNS < 128 ? COLUMNS : 128;
  // Of a multiplying thread, and of one that brings or notes.
  static constexpr int kMultiplyingRegisters = COLUMNS > 64 ? 232 : 168;
  static constexpr int kBringingRegisters = COLUMNS > 64 ? 40 : 48;
  // For __launch_bounds__: how many threads would take all registers. Few columns leave a quarter of them to the grid
  // before, beside which a block then begins.
  static constexpr int kBoundThreads = COLUMNS > 64 ? kTiledThreads : 512;
  static_assert(kWarpgroups * kMultiplyingRegisters + kBringingRegisters <= 3 * (65536 / kBoundThreads / 8 * 8));
};
using FewRoutes = TiledSizes<64, 6, 2>;
using ManyRoutes = TiledSizes<128, 4, 4>;
using SomeRoutes = TiledSizes<160, 4, 4>;
// Which serve down, where a route has two columns, by routes an expert on average. Few, while four times the average
// still fits (32 routes): Mixtral-8x7B has 16 at T = 64, Zipf-skewed one expert has more than 32, and its second item
// is the last of the call and 80 us long (688 us, 636 with Some; drawn evenly 627 and 629). Some, while hardly any
// expert has more than 80: Mixtral-8x7B has 64 +- 7 at T = 256, and with Many half of its experts were read twice (835
// us, 736 so); at 80 on average half have more than fit here, too, and it takes 4% longer.
constexpr int kFewRoutes = 8, kSomeRoutes = 72;

// What the items of a call are cut from.
struct TiledPlan {
  int units;        // of an expert
  int most;         // routes of an item: what fits, or fewer where there would be few items
  int tiles;        // items that share an expert's rows, were all experts asked for alike: for a guess
  int expert_rows;  // from an expert's first row to the next one's, in the matrices that the boxes come from
  RouteLists lists; // of sort_routes
  int32_t *taken;   // how many items blocks have taken, beside a first one each
  bool dependent;   // the columns come from the grid before, which may still run; else the lists do
  bool guesses;     // each block's first item, before there are lists
  // The units of gate_up for each so many routes of an expert: down waits for those of the experts that it serves. 0
  // units: it waits for the end of the grid.
  int awaited_units, awaited_routes;
};

// A place in a ring, as who waits for it to be filled counts: the parity of a stage's phase changes each time round.
template <int STAGES> struct Place {
  int count = 0; // modulo two rounds
  __device__ __forceinline__ int stage() const {
    return count < STAGES ? count : count - STAGES;
  }
  __device__ __forceinline__ int parity() const {
    return count >= STAGES;
  }
  __device__ __forceinline__ void advance() {
    count = count + 1 < 2 * STAGES ? count + 1 : 0;
  }
};

// Routes [first, first + count) of the expert's list, whose columns begin at `group`; units of rows from `unit` on.
// policy: what becomes of the rows in L2. units == 0: no item.
struct Item {
  int expert, unit, units, first, count, group;
  uint64_t policy;
};
// Places for items: while the noting warp looks at the one before its own, rows may be ahead of its own by their stages
// and two.
constexpr int kItems = 16;

__device__ __forceinline__ int steps_of(int length) {
  return (length + kStep - 1) / kStep;
}

// Items that an expert's units make, for the same routes.
template <class Sizes> __host__ __device__ __forceinline__ int blocks_of(int units) {
  return (units + Sizes::kUnits - 1) / Sizes::kUnits;
}

// The shared memory of a block, all of it: at most 227 KB.
template <class Sizes> struct TiledShared {
  alignas(1024) uint8_t rows[Sizes::kRowStages][Sizes::kUnits][kUnitBytes];
  uint8_t columns[Sizes::kColumnStages][Sizes::kColumns / kGroup][kGroupStepBytes];
  // Sums of one half of a unit's rows, on their way to the warpgroup that has the other.
  float4 joined[Sizes::kJoinedTiles == 0 ? 1 : Sizes::kJoinedTiles * kWarpgroup];
  // Barriers. Each unit has rows of its own; both need the same columns.
  uint64_t rows_full[Sizes::kRowStages][Sizes::kUnits], rows_empty[Sizes::kRowStages][Sizes::kUnits];
  uint64_t columns_full[Sizes::kColumnStages], columns_empty[Sizes::kColumnStages];
  uint64_t known[kItems];                // that the item is there; the multiplying warps wait for its rows
  alignas(16) Item items[kItems];        // read 16 bytes at a time
  uint64_t guessed;                      // a barrier: of the rows of a guessed item's first steps
  int32_t before[kTiledMaxExperts + 1];  // items of the experts before
  int32_t offsets[kTiledMaxExperts + 1]; // of the lists
  int32_t routes[2][Sizes::kColumns];    // of the item, by parity of its number
  int32_t tokens[2][Sizes::kColumns];    // where the item's tokens lie, for each warp that brings (TokenColumns)
  int32_t awaited;                       // units of gate_up, of all experts
};

// Items that share an expert's rows, by its routes, PARTS columns a route.
template <class Sizes, int PARTS> __device__ __forceinline__ int tiles_of(int routes, const TiledPlan &plan) {
  constexpr int all = Sizes::kColumns / PARTS, part = Sizes::kPartColumns / PARTS;
  if (plan.most < part) return (routes + plan.most - 1) / plan.most;
  return all > part && routes <= all ? routes > 0 : (routes + part - 1) / part;
}
// Units of gate_up that an expert with so many routes has.
__device__ __forceinline__ int awaited_of(int routes, const TiledPlan &plan) {
  return plan.awaited_units ? (routes + plan.awaited_routes - 1) / plan.awaited_routes * plan.awaited_units : 0;
}

template <class Sizes> __device__ __forceinline__ void init_barriers(TiledShared<Sizes> &shared) {
  const int i = (int)threadIdx.x - 32;
  static_assert(Sizes::kRowStages + 4 <= kItems && Sizes::kColumnStages <= kItems);
  if (i >= 0 && i < kItems) {
    barrier_init(&shared.known[i], 1);
    for (int unit = 0; unit < Sizes::kUnits && i < Sizes::kRowStages; unit++) {
      barrier_init(&shared.rows_full[i][unit], 1);
      barrier_init(&shared.rows_empty[i][unit], kMultiplyingThreads / 32 / Sizes::kUnits);
    }
    if (i < Sizes::kColumnStages) {
      barrier_init(&shared.columns_full[i], 1);
      barrier_init(&shared.columns_empty[i], kMultiplyingThreads / 32);
    }
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// All threads: the places of the experts' items. Lists are read past L1: where they are read before the grid before has
// ended, nothing else says that L1 has not those of an earlier call. !there: as if there were no routes.
template <class Sizes, int PARTS>
__device__ __forceinline__ void place_items(TiledShared<Sizes> &shared, const wd_moe_shape &s, const TiledPlan &plan,
                                            bool there) {
  const int thread = threadIdx.x;
  for (int e = thread; e <= s.experts; e += kTiledThreads)
    shared.offsets[e] = there ? __ldcg(plan.lists.offsets + e) : 0;
  __syncthreads();
  if (thread < 32) {
    const int blocks = blocks_of<Sizes>(plan.units);
    const int each = (s.experts + 31) / 32, first = min(thread * each, s.experts), last = min(first + each, s.experts);
    int own = 0, awaited = 0; // of the lane's experts
    for (int e = first; e < last; e++) {
      const int count = shared.offsets[e + 1] - shared.offsets[e];
      shared.before[e] = own;
      own += tiles_of<Sizes, PARTS>(count, plan) * blocks;
      awaited += awaited_of(count, plan);
    }
    int total = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, total, distance);
      if (thread >= distance) total += other;
    }
    for (int e = first; e < last; e++)
      shared.before[e] += total - own;
    awaited = __reduce_add_sync(~0u, awaited);
    if (thread == 31) shared.before[s.experts] = total, shared.awaited = awaited;
  }
  __syncthreads();
}

// The rows of the item at the block's position, were all experts asked for alike.
template <class Sizes> __device__ __forceinline__ Item guessed_item(const wd_moe_shape &s, const TiledPlan &plan) {
  const int blocks = blocks_of<Sizes>(plan.units);
  Item item = {};
  item.expert = blockIdx.x / (blocks * plan.tiles);
  item.unit = blockIdx.x / plan.tiles % blocks * Sizes::kUnits;
  if (item.expert < s.experts) item.units = min(Sizes::kUnits, plan.units - item.unit);
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
  const int count = shared.offsets[low + 1] - offset, tiles = tiles_of<Sizes, PARTS>(count, plan);
  const int share = ((count + tiles - 1) / tiles + kGroup - 1) / kGroup * kGroup;
  const int tile = local % tiles; // neighbours share rows, in L2 at once
  item.expert = low;
  item.unit = local / tiles * Sizes::kUnits;
  item.units = min(Sizes::kUnits, plan.units - item.unit);
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

// Calls launch(sizes) with items of one unit or of two, parts columns a route: one where, were all experts asked for
// alike, blocks would take no more of them one after the other than of two. (E 8, K 1, H 6208, I 544 at T = 256: 85.6
// us where one warpgroup multiplied a unit alone, 73.9 so. But E 16, K 3, H 6720, I 624 at 64, columns gathered, where
// blocks then take two items instead of one: 120.5 with items of two units, 127.3 of one.)
template <class Sizes, class Launch>
wd_status choose_units(const wd_moe_shape &s, int units, int parts, Launch launch) {
  using One = typename Sizes::OfOneUnit;
  int resident;
  WD_TRY(multiprocessors(&resident));
  const int64_t routes = s.tokens * s.top_k, lists = routes < s.experts ? routes : s.experts;
  const int64_t most = Sizes::kColumns / parts, alike = (routes + lists - 1) / lists;
  const auto rounds = [&](int blocks) {
    return (blocks * lists * ((alike + most - 1) / most) + resident - 1) / resident;
  };
  return rounds(blocks_of<One>(units)) <= rounds(blocks_of<Sizes>(units)) ? launch(One()) : launch(Sizes());
}

// Blocks that stay and take item after item; fewer where there cannot be as many items. Where all experts' units are
// half as many as those that run at once, or fewer, an item has only some of an expert's routes: its rows are then read
// several times, from L2, side by side.
template <class Sizes> wd_status tiled_grid(dim3 *grid, TiledPlan *plan, const wd_moe_shape &s, int routes_per_item) {
  int resident;
  WD_TRY(multiprocessors(&resident));
  const int64_t routes = s.tokens * s.top_k, lists = routes < s.experts ? routes : s.experts;
  plan->most = routes_per_item, plan->tiles = 1;
  const int64_t alike = (routes + lists - 1) / lists, tiles = resident / (plan->units * lists);
  if (alike <= routes_per_item && tiles > 1) {
    const int64_t most = ((alike + tiles - 1) / tiles + kGroup - 1) / kGroup * kGroup;
    if (most < routes_per_item) plan->most = (int)most, plan->tiles = (int)((alike + most - 1) / most);
  }
  const int64_t total = blocks_of<Sizes>(plan->units) * (lists + routes / plan->most);
  *grid = dim3((unsigned)(total < resident ? total : resident));
  return WD_OK;
}

} // namespace wd
