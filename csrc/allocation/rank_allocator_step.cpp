// RankAllocator between optimizer steps: averages, the choice of directions, freezing, shrinking.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <rankwise/rank_allocator.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "../ops/importance.h"
#include "direction_order.h"

namespace rankwise {

void RankAllocator::step(const OptimizerView& optimizer) {
  const at::NoGradGuard no_grad;
  if (optimizer.found_inf.defined() && optimizer.found_inf.item<double>() != 0) {
    ++skipped_steps_;
    return;
  }
  const int64_t now = steps_ + 1;
  if (frozen_) {
    if (!shrunk_) mask();
  } else {
    const Gradients gradients = gather();
    if (!finite(gradients)) {
      ++skipped_steps_;
      return;
    }
    // As the paper's code and PEFT: the last choice uses the scores of the step before.
    const bool last = now >= options_.freeze_step();
    const bool allocates = last || schedule_.allocates(now);
    const at::Tensor scores = take(last ? none() : gradients, allocates);
    if (allocates) choose(now, schedule_.budget(now), scores);
    if (last) freeze_pattern(optimizer);
  }
  steps_ = now;
}

void RankAllocator::freeze(const OptimizerView& optimizer) {
  const at::NoGradGuard no_grad;
  if (frozen_) return;
  choose(steps_, schedule_.final_budget(), scores());
  freeze_pattern(optimizer);
}

// The gradients of all factors, contiguous; nullopt where there is none.
RankAllocator::Gradients RankAllocator::gather() {
  Gradients gradients;
  std::vector<std::string> missing;
  size_t present = 0;
  for (const Adapter& adapter : adapters_) {
    size_t here = 0;
    for (const at::Tensor& factor : adapter.factors()) {
      const at::Tensor& gradient = factor.grad();
      here += gradient.defined();
      gradients.push_back(gradient.defined() ? std::optional(gradient.contiguous()) : std::nullopt);
    }
    if (here < 3) missing.push_back(adapter.name);
    present += here;
  }
  TORCH_CHECK(present > 0,
              "RankAllocator: no adapter has a gradient. It must run after optimizer.step() and "
              "before zero_grad(): allocator.attach(optimizer) does that; after that, nothing may "
              "clear the gradients before the step ends");
  warn_of_missing(missing);
  return gradients;
}

bool RankAllocator::finite(const Gradients& gradients) {
  std::vector<at::Tensor> present;
  for (const std::optional<at::Tensor> gradient : gradients)
    if (gradient) present.push_back(*gradient);
  const at::Tensor found = importance_check(present).cpu();
  const bool* const facts = found.const_data_ptr<bool>();  // not finite, not zero
  if (!facts[0] && !facts[1] && !std::exchange(warned_of_zeros_, true)) {
    TORCH_WARN("RankAllocator: all gradients are zero: were they cleared before the step ended?");
  }
  return !facts[0];
}

RankAllocator::Gradients RankAllocator::none() const {
  Gradients gradients;
  gradients.resize(sensitivity_.size());
  return gradients;
}

// Takes gradients into the averages; the scores, when asked for.
at::Tensor RankAllocator::take(const Gradients& gradients, bool score) {
  fit_averages();
  std::vector<at::Tensor> parameters;
  for (const Adapter& adapter : adapters_)
    for (const at::Tensor& factor : adapter.factors()) parameters.push_back(factor);
  return importance_step_(parameters, gradients, sensitivity_, uncertainty_, initial_ranks_,
                          options_.beta1(), options_.beta2(), score);
}

void RankAllocator::warn_of_missing(const std::vector<std::string>& names) {
  std::string fresh;
  for (const std::string& name : names) {
    if (warned_.insert(name).second) fresh += (fresh.empty() ? "'" : ", '") + name + "'";
  }
  if (!fresh.empty()) {
    TORCH_WARN("RankAllocator: no gradient in step ", steps_ + 1, " for (a factor of) ", fresh,
               ", whose scores stay as they are; a module that never takes part loses its "
               "directions to others");
  }
}

at::Tensor RankAllocator::scores() {
  const at::NoGradGuard no_grad;
  return frozen_ ? at::Tensor() : take(none(), true);
}

void RankAllocator::choose(int64_t step, int64_t budget, const at::Tensor& scores) {
  const at::Tensor now = scores.cpu();
  kept_ = select_triplets(now, initial_ranks_, costs_, budget, options_.min_rank());
  mask();
  record(step, budget, now);
}

void RankAllocator::freeze_pattern(const OptimizerView& optimizer) {
  frozen_ = true;
  sensitivity_.clear();
  uncertainty_.clear();
  if (options_.shrink()) shrink(optimizer);
}

void RankAllocator::mask() {
  std::vector<at::Tensor> lora_E;
  for (const Adapter& adapter : adapters_) lora_E.push_back(adapter.lora_E);
  mask_triplets_(lora_E, initial_ranks_, kept_);
}

void RankAllocator::shrink(const OptimizerView& optimizer) {
  for (const Adapter& adapter : adapters_) {
    if (can_move(adapter, optimizer)) continue;
    TORCH_WARN("RankAllocator: the optimizer's state of '", adapter.name,
               "' cannot follow its directions, so adapters are masked in each step in place of "
               "being shrunk");
    return;
  }
  const std::vector<at::Tensor> kept = kept_.split_with_sizes(initial_ranks_);
  for (size_t m = 0; m < adapters_.size(); ++m) {
    Adapter& adapter = adapters_[m];
    const at::Tensor directions = kept[m].nonzero().squeeze(1);
    keep_directions(adapter, directions, optimizer);
    adapter.change_rank(directions.numel());
  }
  shrunk_ = true;
}

void RankAllocator::record(int64_t step, int64_t budget, const at::Tensor& scores) {
  Allocation entry{.step = step, .budget = budget, .ranks = {}};
  for (const auto& [name, rank] : ranks()) entry.ranks.push_back(rank);
  if (!history_.empty() && history_.back().budget == budget &&
      history_.back().ranks == entry.ranks && step != options_.freeze_step()) {
    return;
  }
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  entry.lowest_kept = entry.highest_pruned = nan;
  const double* const score = scores.const_data_ptr<double>();
  const bool* const keep = kept_.const_data_ptr<bool>();
  for (int64_t i = 0; i < scores.numel(); ++i) {
    entry.mean_score += score[i] / static_cast<double>(scores.numel());
    entry.largest_score = std::max(entry.largest_score, score[i]);
    if (keep[i])  // fmin and fmax pass NaN over
      entry.lowest_kept = std::fmin(entry.lowest_kept, score[i]);
    else
      entry.highest_pruned = std::fmax(entry.highest_pruned, score[i]);
  }
  history_.push_back(std::move(entry));
}

// Puts the averages where the parameters are, which a module's to() may have moved or widened.
void RankAllocator::fit_averages() {
  for (size_t m = 0; m < adapters_.size(); ++m) {
    const std::array<at::Tensor, 3> all = adapters_[m].factors();
    for (size_t f = 0; f < all.size(); ++f) {
      const auto dtype = at::toOpMathType(all[f].scalar_type());
      for (at::Tensor* average : {&sensitivity_[3 * m + f], &uncertainty_[3 * m + f]}) {
        if (average->scalar_type() != dtype || average->device() != all[f].device())
          *average = average->to(all[f].device(), dtype);
      }
    }
  }
}

}  // namespace rankwise
