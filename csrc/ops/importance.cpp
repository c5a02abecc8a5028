// The importance passes as typed calls into the dispatcher.
#include "importance.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstring>

#include "find_op.h"

namespace rankwise {

at::Tensor tensor_of(const kernels::Progress& progress) {
  const at::Tensor tensor = at::empty({sizeof(progress) / sizeof(int64_t)}, at::kLong);
  std::memcpy(tensor.mutable_data_ptr(), &progress, sizeof(progress));
  return tensor;
}

kernels::Progress progress_of(const at::Tensor& progress) {
  kernels::Progress result;
  std::memcpy(&result, progress.cpu().const_data_ptr(), sizeof(result));
  return result;
}

at::Tensor importance_check(at::TensorList gradients) {
  static const auto call = find_op<decltype(importance_check)>("rankwise::_importance_check");
  return call.call(gradients);
}

at::Tensor schedule_step(const at::Tensor& progress, const std::optional<at::Tensor>& found,
                         const std::optional<at::Tensor>& found_inf, const at::Tensor& budgets,
                         int64_t freeze_step) {
  static const auto call = find_op<decltype(schedule_step)>("rankwise::_schedule_step");
  return call.call(progress, found, found_inf, budgets, freeze_step);
}

at::Tensor importance_step_(at::TensorList parameters,
                            const c10::List<std::optional<at::Tensor>>& gradients,
                            at::TensorList sensitivity, at::TensorList uncertainty,
                            at::IntArrayRef ranks, double beta1, double beta2, bool score,
                            const std::optional<at::Tensor>& progress) {
  static const auto call = find_op<decltype(importance_step_)>("rankwise::_importance_step_");
  return call.call(parameters, gradients, sensitivity, uncertainty, ranks, beta1, beta2, score,
                   progress);
}

void select_triplets_(const at::Tensor& kept, const at::Tensor& scores, at::IntArrayRef ranks,
                      at::IntArrayRef costs, int64_t min_rank, const at::Tensor& progress) {
  static const auto call = find_op<decltype(select_triplets_)>("rankwise::_select_triplets_");
  call.call(kept, scores, ranks, costs, min_rank, progress);
}

void mask_triplets_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept,
                    const at::Tensor& progress) {
  static const auto call = find_op<decltype(mask_triplets_)>("rankwise::_mask_triplets_");
  call.call(lora_E, ranks, kept, progress);
}

void record_choice_(const at::Tensor& choices, const at::Tensor& summaries,
                    const at::Tensor& progress, const at::Tensor& scores, const at::Tensor& kept,
                    at::IntArrayRef ranks, int64_t freeze_step) {
  static const auto call = find_op<decltype(record_choice_)>("rankwise::_record_choice_");
  call.call(choices, summaries, progress, scores, kept, ranks, freeze_step);
}

}  // namespace rankwise

// They take parameters that require gradients, and have none.
TORCH_LIBRARY_IMPL(rankwise, Autograd, m) {
  for (const char* name : {"_importance_check", "_schedule_step", "_importance_step_",
                           "_select_triplets_", "_mask_triplets_", "_record_choice_"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}
