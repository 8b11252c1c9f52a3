// arrange.cuh - columns in the order in which wgmma reads them.
//
// A lane of mma.sync holds eight neighbouring values of k, a piece, as four words (of two values); word j of the four
// pieces of a chunk go into one matrix row of 16 bytes. wgmma finds matrix rows in shared memory, so an arranged chunk
// has word j of pieces 0, 1, 2, 3 side by side: a 4 x 4 transposition of words, the same values in the same products.
// Arranged rows are padded with zeros to whole chunks.
#pragma once
#include "common.cuh"

namespace wd {

// Values of an arranged row.
__host__ __device__ __forceinline__ int arranged(int length) {
  return chunks_of(length) * kChunk;
}
// Where value i (even) and its neighbour lie in an arranged row.
__device__ __forceinline__ int arranged_place(int i) {
  return i / kChunk * kChunk + (i % 8 / 2 * 4 + i % kChunk / 8) * 2;
}

} // namespace wd
