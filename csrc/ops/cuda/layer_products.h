// The base products of a layer on CUDA, with the LoRA term before them, in them or behind them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "adapter.h"

namespace rankwise {

// Everything else takes the composite form, which launches nothing for empty results.
bool kernels_serve(const at::Tensor& input, const at::Tensor& weight, int64_t rank);

// y = (scaling * gated B^T + bias) + x W0^T, or scaling * gated B^T + (x W0^T + bias) with factors
// of float32 over 16 bits; rounded after each of the two sums.
at::Tensor add_output(const CudaAdapter& adapter, const at::Tensor& x, const at::Tensor& w,
                      const std::optional<at::Tensor>& bias, const at::Tensor& gated);

// dx = mask(dh A) + dy W0, with input_term(), which has been written.
at::Tensor input_gradient(const CudaAdapter& adapter, const at::Tensor& dy, const at::Tensor& w,
                          const at::Tensor& dh, const ProductTerm& term);

}  // namespace rankwise
