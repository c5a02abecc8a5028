// Asks the driver for maps, by the address that the runtime knows: nothing links the driver.
#include "instructions.h"
#include "tile.h"

namespace rankwise::kernels {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Null where the driver has no such function.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr unsigned since = 12000;  // CUDA 12.0
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             since, cudaEnableDefault, &result);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(function)
             : nullptr;
}

}  // namespace

int make_tensor_map(TensorMap& map, bool bfloat16, const void* data, int64_t rows, int64_t cols,
                    int64_t stride, int box_rows) {
  static const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {box_cols, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(data), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace rankwise::kernels
