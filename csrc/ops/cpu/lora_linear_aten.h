// lora_linear and lora_update on ATen's products: every type, and the path of processors without
// the micro-kernel.
#pragma once

#include "adapter.h"
#include "base_term.h"

namespace rankwise {

Projected forward_on_aten(const ActiveAdapter& adapter, const at::Tensor& x, const BaseTerm& base);

// `weight` [out, in] adds dy W0 to x's gradient; undefined, nothing is added.
FactorGradients backward_on_aten(const ActiveAdapter& adapter, const at::Tensor& dy,
                                 const at::Tensor& x, const at::Tensor& weight,
                                 const at::Tensor& hidden, std::array<bool, 4> output_mask);

}  // namespace rankwise
