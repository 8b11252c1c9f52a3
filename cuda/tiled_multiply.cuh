// tiled_multiply.cuh - the tiled schedule (tiled.cuh): the products of an item's rows and columns, as they come.
#pragma once
#include "tiled_streams.cuh"

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

} // namespace wd
