// device.cuh - what the launchers ask about the current device.
#pragma once
#include "../src/cuda.h"

namespace wd {

// Whether the current device serves programmatic dependent launch (compute capability 9.0 and later).
wd_status serves_dependent_launch(bool *serves);

// Multiprocessors of the current device.
wd_status multiprocessors(int *count);

// Bytes of shared memory that a block of the current device can have.
wd_status shared_memory_of_block(int *bytes);

// Sets shape->kept: whether intermediate and v[T*K, H] of down take at most half of the current device's L2 cache.
wd_status find_kept(wd_moe_shape *shape);

// Shared memory of a block of the direct schedule with `warps` rings of so many bytes, and what else it has there.
constexpr size_t direct_shared_bytes(int warps, size_t ring) {
  return warps * ring + 2048;
}

// Whether an expert has on average at most so many routes.
inline bool routes_an_expert(const wd_moe_shape &s, int64_t most) {
  return s.tokens * s.top_k <= most * s.experts;
}

// Blocks that share one expert's list of routes: 1 while decoding (each expert is read once), more for long lists, so
// that an expert with many tokens does not keep one row of blocks busy alone.
inline unsigned list_splits(const wd_moe_shape &s) {
  const int64_t splits = s.tokens * s.top_k / (64 * (int64_t)s.experts);
  return splits < 1 ? 1u : splits > 16 ? 16u : (unsigned)splits;
}

} // namespace wd
