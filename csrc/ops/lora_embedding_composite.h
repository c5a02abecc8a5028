// lora_embedding from ATen ops alone: the specification of the mathematics, the differentiable form
// for functorch, forward-mode AD and double backward, and the path of devices without kernels.
#pragma once

#include "dispatch.h"

namespace rankwise {

// y and hidden as `_lora_embedding_forward`; every step differentiable.
EmbeddingForwardResult lora_embedding_forward_composite(
    const at::Tensor& indices, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E, double scaling,
    int64_t padding_idx, c10::SymInt rank);

// The gradients, themselves differentiable: `hidden` is computed anew from indices and lora_A.
EmbeddingBackwardResult lora_embedding_backward_composite(
    const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
    const at::Tensor& lora_A, const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
    const at::Tensor& hidden, double scaling, int64_t padding_idx, c10::SymInt rank,
    std::array<bool, 4> output_mask);

}  // namespace rankwise
