// columns.cuh - the tiled schedule's columns: in groups of eight, sorted by expert, in the order in which wgmma reads.
//
// A column is a route's token (one part), or the parts of its intermediate. A lane of mma.sync holds eight neighbouring
// values of k, a piece, as four words (of two values); word j of the four pieces of a chunk go into one matrix row of
// 16 bytes. wgmma finds matrices of eight columns in shared memory, so memory has them in that order:
//
//   [group][part][4 chunk + j][column of the group][piece]   4 bytes each
//
// the same values in the same products. Rows are filled up with zeros to whole chunks, lists to whole groups. So down's
// columns lie. gate_up's are tokens, of which each serves several routes; where it pays (columns_are_tokens) they lie
// apart,
//
//   [token][4 chunk + j][piece]
//
// and are put into matrices on their way to shared memory (TokenColumns).
#pragma once
#include "common.cuh"

namespace wd {

constexpr int kGroup = 8, kMatrixBytes = kGroup * 16;

// Of one part of a group, for columns of `length` values.
__host__ __device__ __forceinline__ int64_t group_bytes(int length) {
  return (int64_t)chunks_of(length) * 4 * kMatrixBytes;
}
// Of the columns of all tokens of a call.
__host__ __device__ __forceinline__ size_t token_columns_bytes(const wd_moe_shape &s) {
  return (size_t)s.tokens * chunks_of(s.hidden) * 2 * kChunk;
}
// Where value i (even) and its neighbour lie in column 0 of a part of a group, in bytes.
__device__ __forceinline__ int place_in_group(int i) {
  return (i / kChunk * 4 + i % 8 / 2) * kMatrixBytes + i % kChunk / 8 * 4;
}
// The first group of an expert whose list starts at `offset`. No two experts' lists share a group, and no sum over the
// experts before is needed: floor((a + b) / 8) + 1 >= floor(a / 8) + ceil(b / 8).
__device__ __forceinline__ int first_group(int offset, int expert, const wd_moe_shape &s) {
  const int64_t routes = s.tokens * s.top_k;
  return routes < routes / kGroup + s.experts ? offset : offset / kGroup + expert; // as wd_column_groups() counts
}

} // namespace wd
