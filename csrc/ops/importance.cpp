// The importance passes as typed calls into the dispatcher.
#include "importance.h"

#include <torch/library.h>

#include "find_op.h"

namespace rankwise {
at::Tensor importance_check(at::TensorList gradients) {
  static const auto call = find_op<decltype(importance_check)>("rankwise::_importance_check");
  return call.call(gradients);
}

at::Tensor importance_step_(at::TensorList parameters,
                            const c10::List<std::optional<at::Tensor>>& gradients,
                            at::TensorList sensitivity, at::TensorList uncertainty,
                            at::IntArrayRef ranks, double beta1, double beta2, bool score) {
  static const auto call = find_op<decltype(importance_step_)>("rankwise::_importance_step_");
  return call.call(parameters, gradients, sensitivity, uncertainty, ranks, beta1, beta2, score);
}

at::Tensor select_triplets(const at::Tensor& scores, at::IntArrayRef ranks, at::IntArrayRef costs,
                           int64_t budget, int64_t min_rank) {
  static const auto call = find_op<decltype(select_triplets)>("rankwise::_select_triplets");
  return call.call(scores, ranks, costs, budget, min_rank);
}

void mask_triplets_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept) {
  static const auto call = find_op<decltype(mask_triplets_)>("rankwise::_mask_triplets_");
  call.call(lora_E, ranks, kept);
}

}  // namespace rankwise

// They take parameters that require gradients, and have none.
TORCH_LIBRARY_IMPL(rankwise, Autograd, m) {
  for (const char* name :
       {"_importance_check", "_importance_step_", "_select_triplets", "_mask_triplets_"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}
