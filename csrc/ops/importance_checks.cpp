#include "importance_checks.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include <numeric>
#include <string>

#include "../kernels/allocation/progress.h"

namespace rankwise {
namespace {

// What an argument is, for messages.
std::string described(const at::Tensor& tensor) {
  return c10::str(tensor.sizes(), " of ", tensor.scalar_type(), " on ", tensor.device(),
                  tensor.is_contiguous() ? "" : ", not contiguous");
}

void check_like(const char* what, const at::Tensor& tensor, const at::Tensor& parameter,
                at::ScalarType dtype) {
  TORCH_CHECK(tensor.sizes() == parameter.sizes() && tensor.scalar_type() == dtype &&
                  tensor.is_contiguous() && tensor.device() == parameter.device(),
              "importance: ", what, " must be contiguous ", parameter.sizes(), " of ", dtype,
              " on ", parameter.device(), ", got ", described(tensor));
}

int64_t directions(const char* op, at::IntArrayRef ranks) {
  for (const int64_t rank : ranks)
    TORCH_CHECK(rank >= 0, op, ": ranks must be at least 0, got ", ranks);
  return std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
}

void check_directions(const char* op, const char* what, const at::Tensor& tensor,
                      at::ScalarType dtype, at::IntArrayRef ranks) {
  TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.dim() == 1 &&
                  tensor.numel() == directions(op, ranks),
              op, ": ", what, " must be a contiguous vector of ", directions(op, ranks), " ", dtype,
              ", got ", described(tensor));
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
  for (size_t m = 0; m < ranks.size(); ++m)
    TORCH_CHECK(ranks[m] >= 0 && ranks[m] <= parameters[3 * m].size(0),
                "importance: a rank must be from 0 to ", parameters[3 * m].size(0), ", got ",
                ranks[m]);
  return present;
}

void check_progress(const char* op, const at::Tensor& progress) {
  constexpr int64_t size = sizeof(kernels::Progress) / sizeof(int64_t);
  TORCH_CHECK(
      progress.scalar_type() == at::kLong && progress.is_contiguous() && progress.numel() == size,
      op, ": progress must be ", size, " contiguous int64, got ", described(progress));
}

void check_schedule_step(const at::Tensor& progress, const at::Tensor& budgets) {
  check_progress("schedule_step", progress);
  TORCH_CHECK(budgets.scalar_type() == at::kLong && budgets.is_contiguous() && budgets.numel() > 0,
              "schedule_step: budgets must be contiguous int64, at least one, got ",
              described(budgets));
}

void check_triplet_selection(const at::Tensor& kept, const at::Tensor& scores,
                             at::IntArrayRef ranks, at::IntArrayRef costs,
                             const at::Tensor& progress) {
  check_progress("select_triplets", progress);
  check_directions("select_triplets", "scores", scores, at::kDouble, ranks);
  check_directions("select_triplets", "kept", kept, at::kBool, ranks);
  TORCH_CHECK(costs.size() == ranks.size(), "select_triplets: there must be ", ranks.size(),
              " costs, got ", costs.size());
}

void check_triplet_mask(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept,
                        const at::Tensor& progress) {
  check_progress("mask_triplets", progress);
  check_directions("mask_triplets", "kept", kept, at::kBool, ranks);
  TORCH_CHECK(lora_E.size() == ranks.size(), "mask_triplets: there must be ", ranks.size(),
              " tensors, got ", lora_E.size());
  for (size_t m = 0; m < ranks.size(); ++m)
    TORCH_CHECK(lora_E[m].dim() == 2 && lora_E[m].size(0) >= ranks[m],
                "mask_triplets: lora_E of rank ", ranks[m], " must be [capacity, 1], got ",
                lora_E[m].sizes());
}

void check_choice(const at::Tensor& choices, const at::Tensor& summaries,
                  const at::Tensor& progress, const at::Tensor& scores, const at::Tensor& kept,
                  at::IntArrayRef ranks) {
  check_progress("record_choice", progress);
  check_directions("record_choice", "scores", scores, at::kDouble, ranks);
  check_directions("record_choice", "kept", kept, at::kBool, ranks);
  const auto width = static_cast<int64_t>(ranks.size()) + 2;
  TORCH_CHECK(choices.scalar_type() == at::kLong && choices.is_contiguous() &&
                  summaries.scalar_type() == at::kDouble && summaries.is_contiguous() &&
                  choices.dim() == 2 && choices.size(1) == width &&
                  summaries.sizes() == at::IntArrayRef({choices.size(0), 4}),
              "record_choice: choices must be contiguous int64 [rows, ", width,
              "] and summaries float64 [rows, 4], got ", described(choices), " and ",
              described(summaries));
}

}  // namespace rankwise
