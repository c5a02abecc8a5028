#include "importance_checks.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include <numeric>

namespace rankwise {
namespace {

void check_like(const char* what, const at::Tensor& tensor, const at::Tensor& parameter,
                at::ScalarType dtype) {
  TORCH_CHECK(tensor.sizes() == parameter.sizes() && tensor.scalar_type() == dtype &&
                  tensor.is_contiguous() && tensor.device() == parameter.device(),
              "importance: ", what, " must be contiguous ", parameter.sizes(), " of ", dtype,
              " on ", parameter.device(), ", got ", tensor.sizes(), " of ", tensor.scalar_type(),
              " on ", tensor.device());
}

int64_t directions(at::IntArrayRef ranks) {
  return std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
}

}  // namespace

void check_importance_gradients(at::TensorList gradients) {
  for (const at::Tensor& gradient : gradients)
    check_like("a gradient", gradient, gradient, gradient.scalar_type());
}

std::vector<at::Tensor> check_importance_step(at::TensorList parameters,
                                              const c10::List<std::optional<at::Tensor>>& gradients,
                                              at::TensorList sensitivity,
                                              at::TensorList uncertainty, at::IntArrayRef ranks) {
  const size_t count = 3 * ranks.size();
  TORCH_CHECK(
      parameters.size() == count && gradients.size() == count && sensitivity.size() == count &&
          uncertainty.size() == count,
      "importance: there must be 3 parameters, gradients and averages of each kind for each "
      "of ",
      ranks.size(), " adapters, got ", parameters.size(), ", ", gradients.size(), ", ",
      sensitivity.size(), " and ", uncertainty.size());
  std::vector<at::Tensor> present(count);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& parameter = parameters[i];
    const at::ScalarType dtype = at::toOpMathType(parameter.scalar_type());
    check_like("a parameter", parameter, parameter, parameter.scalar_type());
    check_like("sensitivity", sensitivity[i], parameter, dtype);
    check_like("uncertainty", uncertainty[i], parameter, dtype);
    present[i] = gradients.get(i).value_or(at::Tensor());
    if (present[i].defined())
      check_like("a gradient", present[i], parameter, parameter.scalar_type());
  }
  return present;
}

void check_triplet_selection(const at::Tensor& scores, at::IntArrayRef ranks,
                             at::IntArrayRef costs) {
  TORCH_CHECK(scores.scalar_type() == at::kDouble && scores.is_contiguous() && scores.dim() == 1,
              "select_triplets: scores must be a float64 vector");
  TORCH_CHECK(costs.size() == ranks.size(), "select_triplets: there must be ", ranks.size(),
              " costs, got ", costs.size());
  TORCH_CHECK(scores.numel() == directions(ranks), "select_triplets: there must be ",
              directions(ranks), " scores, got ", scores.numel());
}

void check_triplet_mask(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept) {
  TORCH_CHECK(lora_E.size() == ranks.size(), "mask_triplets: there must be ", ranks.size(),
              " tensors, got ", lora_E.size());
  TORCH_CHECK(
      kept.scalar_type() == at::kBool && kept.is_contiguous() && kept.numel() == directions(ranks),
      "mask_triplets: kept must be ", directions(ranks), " contiguous bool, got ", kept.numel(),
      " of ", kept.scalar_type());
  for (size_t m = 0; m < ranks.size(); ++m)
    TORCH_CHECK(lora_E[m].dim() == 2 && lora_E[m].size(0) >= ranks[m],
                "mask_triplets: lora_E of rank ", ranks[m], " must be [capacity, 1], got ",
                lora_E[m].sizes());
}

}  // namespace rankwise
