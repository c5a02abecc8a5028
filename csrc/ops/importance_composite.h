// The importance passes in ATen's operations, for devices without kernels of their own, for which
// they wait.
#pragma once

#include "importance.h"

namespace rankwise {

// As in importance.h.
at::Tensor importance_check_composite(at::TensorList gradients);
at::Tensor importance_step_composite_(at::TensorList parameters,
                                      const c10::List<std::optional<at::Tensor>>& gradients,
                                      at::TensorList sensitivity, at::TensorList uncertainty,
                                      at::IntArrayRef ranks, double beta1, double beta2, bool score,
                                      const std::optional<at::Tensor>& progress = {});
void mask_triplets_composite_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept,
                              const at::Tensor& progress);

// On the CPU, whatever the device.
at::Tensor schedule_step_composite(const at::Tensor& progress,
                                   const std::optional<at::Tensor>& found,
                                   const std::optional<at::Tensor>& found_inf,
                                   const at::Tensor& budgets, int64_t freeze_step);
void select_triplets_composite_(const at::Tensor& kept, const at::Tensor& scores,
                                at::IntArrayRef ranks, at::IntArrayRef costs, int64_t min_rank,
                                const at::Tensor& progress);
void record_choice_composite_(const at::Tensor& choices, const at::Tensor& summaries,
                              const at::Tensor& progress, const at::Tensor& scores,
                              const at::Tensor& kept, at::IntArrayRef ranks, int64_t freeze_step);

}  // namespace rankwise
