// rows.cuh - a warp's rows of weights as mma.sync's first operand, by way of shared memory: one layout each.
//
// A step is Rows::kStep values of k. A warp has tiles of 16 rows, low rows 0 to 7 and high rows 8 to 15. Whatever the
// layout, lane (g, t) of a product ends with the same values of rows g and g + 8 (common.cuh).
#pragma once
#include "copies.cuh"

namespace wd {

// The first operands of a chunk's two products: rows g and g + 8, first and second word of each.
struct Operand {
  uint32_t first[4], second[4];
};

// Rows whose values of k are neighbours: a tile, STEP values of each row at a time. Memory gives 256 neighbouring bytes
// faster than twice 128 that are asked for apart: reading alone, by 1 to 5% (the most where rows are long).
template <class T, int STEP> struct PlainRows {
  static constexpr int kTiles = 1, kStep = STEP, kRowBytes = 2 * kStep, kPieces = kRowBytes / 16,
                       kRowsAtOnce = 32 / kPieces, kStepBytesOfWarp = 16 * kRowBytes;
  const T *low, *high; // this lane's piece of the first row that it copies, of the first high row; where step 0 is
  int64_t next_rows;   // from those to the next ones
  int length, rows;    // values from this lane's piece on; rows that exist
  uint32_t arrival, own;

  // low: row 0; high: row 8; the others row_stride behind each other. `rows` of them are read.
  __device__ __forceinline__ PlainRows(const T *low, const T *high, int64_t row_stride, int rows, int length)
      : next_rows(kRowsAtOnce * row_stride), rows(rows) {
    const int lane = threadIdx.x % 32, piece = lane % kPieces;
    const int64_t own_row = lane / kPieces * row_stride + piece * 8;
    this->low = low + own_row, this->high = high + own_row, this->length = length - piece * 8;
    arrival = place_of(lane / kPieces, piece, kRowBytes), own = place_of(lane / 4, lane % 4, kRowBytes);
  }
  // slot: of the warp's rows, in shared memory
  __device__ __forceinline__ void copy(int step, uint32_t slot) const {
    constexpr int kHalf = 8 / kRowsAtOnce;
    const bool within = step * kStep < length;
#pragma unroll
    for (int i = 0; i < 2 * kHalf; i++)
      copy_ahead(slot + arrival + i * kRowsAtOnce * kRowBytes,
                 (i < kHalf ? low : high) + i % kHalf * next_rows + step * kStep,
                 within && i * kRowsAtOnce + (int)(threadIdx.x % 32) / kPieces < rows);
  }
  __device__ __forceinline__ void read(Operand (&a)[kTiles], int chunk, uint32_t slot) const {
    const uint4 l = load_shared(slot + (own ^ chunk * 64)), h = load_shared(slot + (own ^ chunk * 64) + 8 * kRowBytes);
    a[0] = {{l.x, h.x, l.y, h.y}, {l.z, h.z, l.w, h.w}};
  }
};

// Transposed weights: the same value of k of neighbouring rows lies side by side. TILES tiles, of which the low rows
// are pieces 0 to TILES - 1 and the high rows the other TILES pieces; a piece is 8 rows, 16 bytes of each of 64 lines
// of k.
template <class T, int TILES> struct TransposedRows {
  static_assert(TILES == 2 || TILES == 4, "lines of 64 or 128 bytes in shared memory");
  static constexpr int kTiles = TILES, kStep = wd::kStep, kPieces = 2 * TILES, kLineBytes = 16 * kPieces,
                       kStepBytesOfWarp = kStep * kLineBytes, kLines = 32 / kPieces; // that a warp copies at once
  const T *source; // this lane's piece, in its line of step 0
  int64_t k_stride;
  int length; // values of k from this lane's first line on; 0 where there is no such piece
  uint32_t arrival, own;

  // piece: this lane's, lane % kPieces, in line 0; NULL where there is none.
  __device__ __forceinline__ TransposedRows(const T *piece, int64_t k_stride, int length) : k_stride(k_stride) {
    const int lane = threadIdx.x % 32, line = lane / kPieces;
    source = piece + line * k_stride, this->length = piece ? length - line : 0;
    arrival = line * kLineBytes + place(lane % kPieces, line);
    // Matrix lane / 8 of four (rows low, high, low, high of the first two, then the next two values of each lane), line
    // lane % 8 of it: mma.sync's position 2t + i holds value 8t + i of the chunk, position 2t + 8 + i value 8t + 2 + i.
    const int matrix = lane / 8, j = lane % 8, k = j / 2 * 8 + j % 2 + matrix / 2 * 2;
    own = k * kLineBytes + place(matrix % 2 * TILES, k);
  }
  // Where a piece of a line lies in it: the eight lines of a matrix must not meet in a bank.
  static __device__ __forceinline__ uint32_t place(int piece, int k) {
    return (piece ^ (TILES == 4 ? k % 2 + k % 32 / 8 * 2 : k % 32 / 8)) * 16;
  }
  __device__ __forceinline__ void copy(int step, uint32_t slot) const {
    const T *p = source + step * kStep * k_stride;
#pragma unroll
    for (int i = 0; i < kStep / kLines; i++)
      copy_of_line(slot + i * kLines * kLineBytes + (arrival ^ place(0, i * kLines)), p + i * kLines * k_stride,
                   step * kStep + i * kLines < length);
  }
  __device__ __forceinline__ void read(Operand (&a)[TILES], int chunk, uint32_t slot) const {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const uint32_t at = slot + (own ^ tile * 16) + chunk * kChunk * kLineBytes;
      load_transposed(a[tile].first, at);
      load_transposed(a[tile].second, at + 4 * kLineBytes);
    }
  }
  static __device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
};

} // namespace wd
