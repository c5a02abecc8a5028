// lora_linear and lora_update from ATen ops alone: the specification of the mathematics, the
// differentiable form for functorch, forward-mode AD and double backward, and the path of devices
// without kernels.
#pragma once

#include "dispatch.h"

namespace rankwise {

// y, hidden and seed as `_lora_linear_forward`; every step differentiable.
LinearForward lora_linear_forward_composite;
UpdateForward lora_update_forward_composite;

// lora_linear's output and `hidden`, with a seed that was drawn.
std::pair<at::Tensor, at::Tensor> lora_linear_of_seed(const at::Tensor& input,
                                                      const at::Tensor& weight,
                                                      const std::optional<at::Tensor>& bias,
                                                      const AdapterOperands& operands,
                                                      const at::Tensor& seed);

// The gradients, themselves differentiable: `hidden` is computed anew from input and lora_A.
LinearBackward lora_linear_backward_composite;
UpdateBackward lora_update_backward_composite;

}  // namespace rankwise
