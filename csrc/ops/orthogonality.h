// What the implementations of the orthogonality penalty share.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace rankwise {

// Throws unless shapes, dtypes and ranks fit (the contract stands in ops.h).
void check_orthogonality(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks);

// The penalty and its gradients in ATen's operations, for devices without kernels of their own.
at::Tensor orthogonality_penalty_composite(at::TensorList lora_A, at::TensorList lora_B,
                                           at::IntArrayRef ranks, bool squared);
std::vector<at::Tensor> orthogonality_backward_composite(const at::Tensor& grad_output,
                                                         at::TensorList lora_A,
                                                         at::TensorList lora_B,
                                                         at::IntArrayRef ranks, bool squared);

}  // namespace rankwise
