// lora_linear from ATen ops alone: the specification of the mathematics, the differentiable form
// for functorch, forward-mode AD and double backward, and the path of devices without kernels.
#pragma once

#include "dispatch.h"

namespace rankwise {

// y, hidden and seed as `_lora_linear_forward`; every step differentiable.
ForwardResult lora_linear_forward_composite(const at::Tensor& input, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias,
                                            const at::Tensor& lora_A, const at::Tensor& lora_B,
                                            const std::optional<at::Tensor>& lora_E, double scaling,
                                            double dropout_p, c10::SymInt rank);

// The gradients, themselves differentiable: `hidden` is computed anew from input and lora_A.
BackwardResult lora_linear_backward_composite(const at::Tensor& grad_output,
                                              const at::Tensor& input, const at::Tensor& weight,
                                              const at::Tensor& lora_A, const at::Tensor& lora_B,
                                              const std::optional<at::Tensor>& lora_E,
                                              const at::Tensor& hidden, const at::Tensor& seed,
                                              double scaling, double dropout_p, c10::SymInt rank,
                                              std::array<bool, 6> output_mask);

}  // namespace rankwise
