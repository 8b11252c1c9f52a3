// flags.cuh - from gate_up to down, expert by expert (grouped): which intermediates are there.
//
// The end of gate_up's grid is some microseconds in which memory has little to do: the last blocks finish, then those
// of down have their columns brought. So down does not wait for it, but for the blocks that serve its own expert. Each
// has a flag: 0 before it lets the next grid begin, 1 when what it stored can be read. down's blocks begin only when
// all of gate_up's have, so a flag is never one of an earlier call, and nobody waits for a block that has not begun.
// That a grid which is let in sees what was stored and fenced before is how the hardware does it; PTX promises it
// behind griddepcontrol.wait alone. (tiled counts instead: tiled_plan.cuh. direct, whose blocks run all at once, waits
// for the grid: with flags it took 2 to 4 us longer.)
#pragma once
#include "device.cuh"
#include "launch.cuh"
#include "routes.cuh"

namespace wd {

// For calls of up to so many routes: longer ones do not need them. And a block serves so many neurons or more.
constexpr int kFlaggedRoutes = 1024;
constexpr int kFlagNeurons = 16;
inline size_t flags_bytes(const wd_moe_shape &s) {
  if (s.tokens * s.top_k > kFlaggedRoutes) return 0;
  const size_t blocks = (size_t)serving_blocks(s) * list_splits(s);
  return blocks * ((s.intermediate + kFlagNeurons - 1) / kFlagNeurons) * sizeof(int32_t);
}

// Of gate_up's blocks in the scratch, behind v: [serving block][split][row block].
struct Flags {
  int32_t *first; // or NULL: down waits for the grid's end
  int row_blocks, splits, split_routes;

  // Of a block of gate_up, or the first of those that a block of down meets: grid (row blocks, serving blocks, splits).
  __device__ __forceinline__ int32_t *at(int split, int row_block) const {
    return first + ((int64_t)blockIdx.y * splits + split) * row_blocks + row_block;
  }
  // By all threads of a block of gate_up, as soon as the grid before has ended; once more when its first copies are on
  // their way.
  __device__ __forceinline__ void begin() const {
    if (!first)
      allow_next_grid();
    else if (threadIdx.x == 0)
      store_relaxed(at(blockIdx.z, blockIdx.x), 0);
  }
  __device__ __forceinline__ void begun() const {
    if (!first || threadIdx.x != 0) return;
    __threadfence();
    allow_next_grid();
  }
  // By all threads of a block of gate_up that has served routes.
  __device__ __forceinline__ void served() const {
    if (!first) return;
    __syncthreads();
    if (threadIdx.x == 0) store_release(at(blockIdx.z, blockIdx.x), 1);
  }
  // By all threads of a block of down, whose expert has `count` routes.
  __device__ __forceinline__ void meet(int count) const {
    if (!first) return wait_for_previous_grid();
    const int flags = min(splits, (count + split_routes - 1) / split_routes) * row_blocks;
    for (int i = threadIdx.x; i < flags; i += blockDim.x)
      while (load_acquire(at(0, i)) != 1) {
      }
    __syncthreads();
  }
};

// Those that down was told of.
inline Flags handed_over(const wd_moe_shape &s, void *scratch, const wd_cuda_handover &handover) {
  char *const flags = (char *)scratch + sorted_routes_span(s) + down_values_bytes(s); // no columns here: not tiled
  return {handover.row_blocks > 0 ? (int32_t *)flags : nullptr, handover.row_blocks, handover.splits,
          handover.split_routes};
}
// Of the grid that *handover then describes. None where nobody follows, where the next grid cannot begin early, where
// the blocks are few (small ones: five an SM run at once), or down's large blocks do, two an SM: those had better begin
// together, or some end late (Mixtral-8x7B at T = 16: 650 us, with flags 655).
inline wd_status flags_for(Flags *flags, const wd_moe_shape &s, void *scratch, wd_cuda_handover grid,
                           wd_cuda_handover *handover) {
  bool early_launch;
  int sms;
  WD_TRY(serves_dependent_launch(&early_launch));
  WD_TRY(multiprocessors(&sms));
  const int64_t experts = serving_blocks(s);
  const bool many = grid.row_blocks * experts > 5 * sms,
             together = !routes_an_expert(s, 2) && s.hidden / 128 * experts <= 2 * sms;
  *flags = {};
  if (handover && early_launch && many && !together && s.tokens * s.top_k <= kFlaggedRoutes) *handover = grid;
  if (handover) *flags = handed_over(s, scratch, *handover);
  return WD_OK;
}

} // namespace wd
