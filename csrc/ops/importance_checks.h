// Argument checks of the importance passes that their implementations share.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <vector>

namespace rankwise {

// Throws unless each gradient is contiguous.
void check_importance_gradients(at::TensorList gradients);

// Throws unless the lists fit (the contract stands in importance.h) and all tensors are contiguous.
// Returns the gradients, undefined where there is none.
std::vector<at::Tensor> check_importance_step(at::TensorList parameters,
                                              const c10::List<std::optional<at::Tensor>>& gradients,
                                              at::TensorList sensitivity,
                                              at::TensorList uncertainty, at::IntArrayRef ranks);

// Throws unless there is one float64 score for each direction and one cost for each adapter.
void check_triplet_selection(const at::Tensor& scores, at::IntArrayRef ranks,
                             at::IntArrayRef costs);

// Throws unless there is one lora_E for each rank, and a bool in `kept` for each direction.
void check_triplet_mask(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept);

}  // namespace rankwise
