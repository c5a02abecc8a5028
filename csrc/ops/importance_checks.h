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

// Throws unless progress is contiguous int64 of a Progress's size.
void check_progress(const char* op, const at::Tensor& progress);

// Throws unless there are int64 budgets.
void check_schedule_step(const at::Tensor& progress, const at::Tensor& budgets);

// Throws unless there is one float64 score and one bool for each direction and one cost for each
// adapter.
void check_triplet_selection(const at::Tensor& kept, const at::Tensor& scores,
                             at::IntArrayRef ranks, at::IntArrayRef costs,
                             const at::Tensor& progress);

// Throws unless there is one lora_E for each rank, and a bool in `kept` for each direction.
void check_triplet_mask(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept,
                        const at::Tensor& progress);

// Throws unless there are rows for these adapters, one score and one bool for each direction.
void check_choice(const at::Tensor& choices, const at::Tensor& summaries,
                  const at::Tensor& progress, const at::Tensor& scores, const at::Tensor& kept,
                  at::IntArrayRef ranks);

}  // namespace rankwise
