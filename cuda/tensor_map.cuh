// tensor_map.cuh - boxes by the tensor memory accelerator (sm_90): the host describes memory, one thread asks for
// boxes.
#pragma once
#include "copies.cuh"
#include "launch.cuh"
#include <cuda.h>

namespace wd {

// Rows: `rows` rows of `length` 2-byte values, a row's start `pitch` values behind that of the row before; boxes of 64
// values by box_rows rows. In shared memory (aligned to 1024 bytes) a box has rows of 128 bytes; the 16-byte piece p of
// row r lies at p ^ r % 8. What lies outside arrives as zeros.
wd_status describe_rows(CUtensorMap *map, const void *matrix, int64_t length, int64_t rows, int64_t pitch,
                        int box_rows);

// Of a unit's boxes, one after the other.
struct RowMaps {
  CUtensorMap box[2];
};

// Columns (columns.cuh): `parts` parts of groups, each with the matrices of `length` values; boxes of a step of
// box_parts of them.
wd_status describe_columns(CUtensorMap *map, const void *columns, int length, int64_t parts, int box_parts);

// One box to `target` in shared memory; the barrier hears of its bytes. From value `value` of row `row`. policy: what
// becomes of it in L2 (kept.cuh), or 0: no word of it.
__device__ __forceinline__ void copy_rows(void *target, const CUtensorMap &map, int value, int row, uint64_t *barrier,
                                          uint64_t policy) {
  if (policy == 0)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(shared_address(target)),
                 "l"(&map), "r"(value), "r"(row), "r"(shared_address(barrier))
                 : "memory");
  else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(target)),
                 "l"(&map), "r"(value), "r"(row), "r"(shared_address(barrier)), "l"(policy)
                 : "memory");
}
// From matrix `matrix` of part `part`.
__device__ __forceinline__ void copy_columns(void *target, const CUtensorMap &map, int matrix, int part,
                                             uint64_t *barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
               "[%5];" ::"r"(shared_address(target)),
               "l"(&map), "r"(0), "r"(matrix), "r"(part), "r"(shared_address(barrier))
               : "memory");
}

} // namespace wd
