// The dropout mask as a tensor on CUDA.
#include "../dropout.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include "../../kernels/dropout_mask.h"
#include "../checks.h"
#include "path.h"

namespace rankwise {
namespace {

template <typename T>
void launch(const at::Tensor& seed, uint32_t threshold, const at::Tensor& mask) {
  const int error = kernels::launch_dropout_mask(
      seed.const_data_ptr<int64_t>(), mask.numel(), threshold,
      static_cast<T*>(mask.mutable_data_ptr()), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

at::Tensor dropout_mask_cuda(const at::Tensor& seed, int64_t rows, int64_t cols, double dropout_p,
                             at::ScalarType dtype) {
  check_dropout_p("_dropout_mask", dropout_p);
  check_seed("_dropout_mask", seed, dropout_p);
  const c10::cuda::CUDAGuard guard(seed.device());
  const uint32_t threshold = Dropout(dropout_p).threshold();
  if (threshold == 0) return at::ones({rows, cols}, seed.options().dtype(dtype));
  if (!has_kernels(seed.device())) {
    return dropout_mask_composite(seed, rows, cols, dropout_p, dtype);
  }
  const at::Tensor mask = at::empty({rows, cols}, seed.options().dtype(dtype));
  switch (dtype) {
    case at::kDouble:
      launch<double>(seed, threshold, mask);
      break;
    case at::kFloat:
      launch<float>(seed, threshold, mask);
      break;
    case at::kBFloat16:
      launch<__nv_bfloat16>(seed, threshold, mask);
      break;
    case at::kHalf:
      launch<__half>(seed, threshold, mask);
      break;
    default:
      TORCH_CHECK(false, "_dropout_mask: dtype must be floating, got ", dtype);
  }
  return mask;
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_dropout_mask", &rankwise::dropout_mask_cuda);
}
