// lora_linear and lora_update on oneDNN's micro-kernel: float32, bfloat16, and float32 factors over
// bfloat16.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "adapter.h"
#include "base_term.h"

namespace rankwise {

// Whether panels serve these types and sizes on this processor.
bool in_panels(const at::Tensor& x, const ActiveAdapter& adapter);

// As forward_on_aten and backward_on_aten.
Projected forward_in_panels(const AdapterGroup& group, const at::Tensor& x,
                            const std::vector<BaseTerm>& bases);
FactorGradients backward_in_panels(const AdapterGroup& group,
                                   const std::vector<OutputTerm>& outputs, const at::Tensor& x,
                                   const at::Tensor& hidden, std::array<bool, 4> output_mask);

}  // namespace rankwise
