// AdaLoRA's schedule and history on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../importance.h"
#include "../importance_checks.h"

namespace rankwise {
namespace {

at::Tensor schedule_step_cpu(const at::Tensor& progress, const std::optional<at::Tensor>& found,
                             const std::optional<at::Tensor>& found_inf, const at::Tensor& budgets,
                             int64_t freeze_step) {
  check_schedule_step(progress, budgets);
  const bool* const facts = found ? found->const_data_ptr<bool>() : nullptr;
  const bool left_out = found_inf && found_inf->item<double>() != 0;
  return tensor_of(kernels::after_step(progress_of(progress), facts, left_out,
                                       budgets.const_data_ptr<int64_t>(), budgets.numel(),
                                       freeze_step));
}

// Mean and largest score, lowest kept and highest pruned.
std::vector<double> summary_of(const at::Tensor& scores, const bool* keep) {
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  double mean = 0, largest = 0, lowest_kept = nan, highest_pruned = nan;
  const double* const score = scores.const_data_ptr<double>();
  for (int64_t i = 0; i < scores.numel(); ++i) {
    mean += score[i] / static_cast<double>(scores.numel());
    largest = std::max(largest, score[i]);
    if (keep[i])  // fmin and fmax pass NaN over
      lowest_kept = std::fmin(lowest_kept, score[i]);
    else
      highest_pruned = std::fmax(highest_pruned, score[i]);
  }
  return {mean, largest, lowest_kept, highest_pruned};
}

void record_choice_cpu_(const at::Tensor& choices, const at::Tensor& summaries,
                        const at::Tensor& progress, const at::Tensor& scores,
                        const at::Tensor& kept, at::IntArrayRef ranks, int64_t freeze_step) {
  check_choice(choices, summaries, progress, scores, kept, ranks);
  kernels::Progress now = progress_of(progress);
  if (now.budget < 0) return;
  const bool* keep = kept.const_data_ptr<bool>();
  std::vector<int64_t> row = {now.steps, now.budget};
  for (const int64_t rank : ranks) {
    row.push_back(std::count(keep, keep + rank, true));
    keep += rank;
  }
  const auto width = static_cast<int64_t>(row.size());
  int64_t* const place = choices.mutable_data_ptr<int64_t>() + now.recorded * width;
  if (now.recorded > 0 && now.steps != freeze_step &&
      std::equal(row.begin() + 1, row.end(), place - width + 1)) {
    return;
  }
  std::ranges::copy(row, place);
  std::ranges::copy(summary_of(scores, kept.const_data_ptr<bool>()),
                    summaries.mutable_data_ptr<double>() + 4 * now.recorded);
  ++now.recorded;
  progress.copy_(tensor_of(now));
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_schedule_step", &rankwise::schedule_step_cpu);
  m.impl("_record_choice_", &rankwise::record_choice_cpu_);
}
