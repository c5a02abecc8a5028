// lora_linear and lora_update on oneDNN's micro-kernel: float32, bfloat16, and float32 factors over
// bfloat16.
#pragma once

#include <ATen/core/Tensor.h>

#include "adapter.h"
#include "base_term.h"

namespace rankwise {

// Whether panels serve these types and sizes on this processor.
bool in_panels(const at::Tensor& x, const ActiveAdapter& adapter);

Projected forward_in_panels(const ActiveAdapter& adapter, const at::Tensor& x,
                            const BaseTerm& base);

// `weight` as for backward_on_aten.
FactorGradients backward_in_panels(const ActiveAdapter& adapter, const at::Tensor& dy,
                                   const at::Tensor& x, const at::Tensor& weight,
                                   const at::Tensor& hidden, std::array<bool, 4> output_mask);

}  // namespace rankwise
