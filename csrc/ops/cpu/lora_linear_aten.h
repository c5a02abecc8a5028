// lora_linear and lora_update on ATen's products: every type, and the path of processors without
// the micro-kernel.
#pragma once

#include <array>
#include <vector>

#include "adapter.h"
#include "base_term.h"

namespace rankwise {

// A term for each of the group's members.
Projected forward_on_aten(const AdapterGroup& group, const at::Tensor& x,
                          const std::vector<BaseTerm>& bases);

// `output_mask`: x, A, B, E.
FactorGradients backward_on_aten(const AdapterGroup& group, const std::vector<OutputTerm>& outputs,
                                 const at::Tensor& x, const at::Tensor& hidden,
                                 std::array<bool, 4> output_mask);

}  // namespace rankwise
