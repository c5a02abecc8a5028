// The importance passes in ATen's operations, for devices without kernels of their own.
#pragma once

#include "importance.h"

namespace rankwise {

// As in importance.h.
at::Tensor importance_check_composite(at::TensorList gradients);
at::Tensor importance_step_composite_(at::TensorList parameters,
                                      const c10::List<std::optional<at::Tensor>>& gradients,
                                      at::TensorList sensitivity, at::TensorList uncertainty,
                                      at::IntArrayRef ranks, double beta1, double beta2,
                                      bool score);
void mask_triplets_composite_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept);

}  // namespace rankwise
