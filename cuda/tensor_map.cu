// tensor_map.cu - describes matrices for the tensor memory accelerator, by the driver: no library is linked for it.
#include "columns.cuh"
#include "tensor_map.cuh"

namespace wd {

using Encode = decltype(&cuTensorMapEncodeTiled);

static wd_status find_encode(Encode *encode) {
  static std::atomic<void *> found; // read-only once set
  void *function = found.load(std::memory_order_relaxed);
  if (function == nullptr) {
    cudaDriverEntryPointQueryResult result;
    WD_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || function == nullptr)
      return wd_fail(WD_CUDA_ERROR,
                     "CUDA: the driver has no cuTensorMapEncodeTiled, expected one for CUDA 12.0 or newer");
    found.store(function, std::memory_order_relaxed);
  }
  *encode = (Encode)function;
  return WD_OK;
}

// 2-byte values as they are, axes innermost first; pitches in bytes, of all axes but the first.
static wd_status describe(CUtensorMap *map, const void *memory, int axes, const cuuint64_t *sizes,
                          const cuuint64_t *pitches, const cuuint32_t *box, CUtensorMapSwizzle swizzle,
                          CUtensorMapL2promotion promotion) {
  Encode encode = nullptr;
  WD_TRY(find_encode(&encode));
  const cuuint32_t every[3] = {1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, (cuuint32_t)axes, (void *)memory, sizes, pitches, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return wd_fail(WD_CUDA_ERROR, "CUDA: cuTensorMapEncodeTiled: error %d for %llu rows of %llu values", (int)result,
                   (unsigned long long)sizes[axes - 1], (unsigned long long)sizes[0]);
  return WD_OK;
}

wd_status describe_rows(CUtensorMap *map, const void *matrix, int64_t length, int64_t rows, int64_t pitch,
                        int box_rows) {
  const cuuint64_t sizes[2] = {(cuuint64_t)length, (cuuint64_t)rows}, pitches[1] = {2 * (cuuint64_t)pitch};
  const cuuint32_t box[2] = {kStep, (cuuint32_t)box_rows};
  // No more than the box's own 128 bytes to L2: what lies beside them is asked for at once (kStepsTogether), and with
  // 256 would be asked for twice (a kernel that does nothing else: .90 of a plain read, .98 so).
  return describe(map, matrix, 2, sizes, pitches, box, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

wd_status describe_columns(CUtensorMap *map, const void *columns, int length, int64_t parts, int box_parts) {
  const cuuint64_t bytes = (cuuint64_t)group_bytes(length);
  const cuuint64_t sizes[3] = {kMatrixBytes / 2, bytes / kMatrixBytes, (cuuint64_t)parts};
  const cuuint64_t pitches[2] = {kMatrixBytes, bytes};
  const cuuint32_t box[3] = {kMatrixBytes / 2, kStep / 8, (cuuint32_t)box_parts};
  return describe(map, columns, 3, sizes, pitches, box, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE);
}

} // namespace wd
