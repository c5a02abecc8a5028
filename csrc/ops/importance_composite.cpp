// The importance passes in ATen's operations, for devices without kernels of their own. They agree
// with the kernels up to rounding.
#include "importance_composite.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <numeric>
#include <vector>

#include "../kernels/allocation/importance.h"

namespace rankwise {
namespace {

// |w dL/dw|, finite like kernels::sensitivity_now.
at::Tensor sensitivity_now(const at::Tensor& parameter, const at::Tensor& gradient,
                           at::ScalarType dtype) {
  const double largest = dtype == at::kDouble ? kernels::largest_sensitivity<double>
                                              : kernels::largest_sensitivity<float>;
  const at::Tensor now = (parameter.to(dtype) * gradient.to(dtype)).abs_();
  return at::where(now < largest, now, at::full({}, largest, now.options()));
}

at::Tensor element_scores(const at::Tensor& sensitivity, const at::Tensor& uncertainty) {
  return sensitivity.to(at::kDouble) * uncertainty.to(at::kDouble);
}

}  // namespace

at::Tensor importance_check_composite(at::TensorList gradients) {
  at::Tensor finite = at::ones({}, gradients[0].options().dtype(at::kBool));
  at::Tensor nonzero = at::zeros_like(finite);
  for (const at::Tensor& gradient : gradients) {
    finite.logical_and_(gradient.isfinite().all());
    nonzero.logical_or_(gradient.any());
  }
  return at::stack({finite.logical_not(), nonzero});
}

at::Tensor importance_step_composite_(at::TensorList parameters,
                                      const c10::List<std::optional<at::Tensor>>& gradients,
                                      at::TensorList sensitivity, at::TensorList uncertainty,
                                      at::IntArrayRef ranks, double beta1, double beta2, bool score,
                                      const std::optional<at::Tensor>& progress) {
  const kernels::Progress now =
      progress ? progress_of(*progress) : kernels::Progress{.budget = 0, .updates = 1};
  for (size_t i = 0; i < parameters.size(); ++i) {
    const std::optional<at::Tensor> gradient = gradients.get(i);
    if (!gradient || !now.updates) continue;
    const at::Tensor &s = sensitivity[i], &u = uncertainty[i];
    const at::Tensor now = sensitivity_now(parameters[i], *gradient, s.scalar_type());
    s.mul_(beta1).add_(now, 1 - beta1);
    u.mul_(beta2).add_((now - s).abs_(), 1 - beta2);
  }
  const at::TensorOptions options = sensitivity[0].options().dtype(at::kDouble);
  if (!score || now.budget < 0) {
    return at::empty({std::accumulate(ranks.begin(), ranks.end(), int64_t{0})}, options);
  }
  std::vector<at::Tensor> scores;
  for (size_t m = 0; m < ranks.size(); ++m) {
    const auto elements = [&](size_t f) {
      return element_scores(sensitivity[3 * m + f], uncertainty[3 * m + f]);
    };
    const at::Tensor all = elements(2).squeeze(1) + (elements(0).mean(1) + elements(1).mean(0));
    scores.push_back(all.narrow(0, 0, ranks[m]));
  }
  return at::cat(scores);
}

void mask_triplets_composite_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept,
                              const at::Tensor& progress) {
  if (progress_of(progress).budget < 0) return;
  const std::vector<at::Tensor> keep = kept.split_with_sizes(ranks);
  for (size_t m = 0; m < ranks.size(); ++m) {
    lora_E[m].narrow(0, 0, ranks[m]).masked_fill_(keep[m].logical_not().unsqueeze(1), 0);
  }
}

at::Tensor schedule_step_composite(const at::Tensor& progress,
                                   const std::optional<at::Tensor>& found,
                                   const std::optional<at::Tensor>& found_inf,
                                   const at::Tensor& budgets, int64_t freeze_step) {
  const auto host = [](const std::optional<at::Tensor>& tensor) {
    return tensor ? std::optional(tensor->cpu()) : std::nullopt;
  };
  return schedule_step(progress.cpu(), host(found), host(found_inf), budgets.cpu(), freeze_step)
      .to(progress.device());
}

void select_triplets_composite_(const at::Tensor& kept, const at::Tensor& scores,
                                at::IntArrayRef ranks, at::IntArrayRef costs, int64_t min_rank,
                                const at::Tensor& progress) {
  const at::Tensor host = kept.cpu();
  select_triplets_(host, scores.cpu(), ranks, costs, min_rank, progress.cpu());
  kept.copy_(host);
}

void record_choice_composite_(const at::Tensor& choices, const at::Tensor& summaries,
                              const at::Tensor& progress, const at::Tensor& scores,
                              const at::Tensor& kept, at::IntArrayRef ranks, int64_t freeze_step) {
  const std::array written = {choices, summaries, progress};
  const std::array host = {choices.cpu(), summaries.cpu(), progress.cpu()};
  record_choice_(host[0], host[1], host[2], scores.cpu(), kept.cpu(), ranks, freeze_step);
  for (size_t i = 0; i < written.size(); ++i) written[i].copy_(host[i]);
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("_importance_check", &rankwise::importance_check_composite);
  m.impl("_importance_step_", &rankwise::importance_step_composite_);
  m.impl("_mask_triplets_", &rankwise::mask_triplets_composite_);
  m.impl("_schedule_step", &rankwise::schedule_step_composite);
  m.impl("_select_triplets_", &rankwise::select_triplets_composite_);
  m.impl("_record_choice_", &rankwise::record_choice_composite_);
}
