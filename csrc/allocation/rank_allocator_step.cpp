// RankAllocator between optimizer steps: averages, the choice of directions, freezing, shrinking.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <rankwise/rank_allocator.h>

#include "../ops/importance.h"
#include "direction_order.h"
#include "group_decision.h"

namespace rankwise {

void RankAllocator::take_step(const OptimizerView& optimizer) {
  const at::NoGradGuard no_grad;
  check_adapters();
  check_all_memory();
  place();
  const Gradients gradients = frozen_ ? none() : gather(most_steps() + 1);
  warn_of_earlier_schedule();
  warn_of_untrained(optimizer);
  std::optional<at::Tensor> found, found_inf;
  if (!frozen_) found = importance_check(present(gradients));
  if (optimizer.found_inf.defined()) found_inf = optimizer.found_inf.to(progress_.device());
  const int64_t now = most_steps() + 1;
  make_room(now);
  const at::Tensor progress =
      schedule_step(progress_, found, found_inf, budgets_, options_.freeze_step());
  if (!frozen_) {
    const bool may_choose = now > options_.warmup_steps();
    unless_agreed(meets() ? averages() : std::vector<at::Tensor>(), [&] {
      const at::Tensor scores = take(gradients, may_choose, progress);
      if (may_choose) {
        choose(/*freezes=*/false, scores, progress, optimizer);
      } else if (meets()) {
        meet(/*freezes=*/false, progress, scores, kept_, optimizer);
      }
    });
  } else {
    if (meets()) meet(/*freezes=*/false, progress, {}, kept_, optimizer);
    if (!shrunk_) mask(progress);
  }
  *stepped_ = true;
  ++calls_;
  set_progress(progress);
  warn_of_zeros();
  const auto last = options_.freeze_step();
  if (!frozen_ && most_steps() >= last && steps() >= last) freeze_pattern(optimizer);
}

void RankAllocator::freeze(const OptimizerView& optimizer) {
  if (frozen_) return;
  in_group(/*meets=*/true, [&] { freeze_now(optimizer); });
  call_back();
}

void RankAllocator::freeze_now(const OptimizerView& optimizer) {
  const at::NoGradGuard no_grad;
  check_adapters();
  check_all_memory();
  place();
  make_room(most_steps());
  kernels::Progress now = progress_of(progress_);
  now.budget = schedule_.final_budget();
  const at::Tensor progress = tensor_of(now).to(progress_.device());
  choose(/*freezes=*/true, scores(), progress, optimizer);
  *stepped_ = true;
  set_progress(progress);
  freeze_pattern(optimizer);
}

RankAllocator::Gradients RankAllocator::none() const {
  Gradients gradients;
  gradients.resize(sensitivity_.size());
  return gradients;
}

// Takes gradients into the averages; the scores, when asked for.
at::Tensor RankAllocator::take(const Gradients& gradients, bool score,
                               const std::optional<at::Tensor>& progress) {
  fit_averages();
  return importance_step_(factors_, gradients, sensitivity_, uncertainty_, initial_ranks_,
                          options_.beta1(), options_.beta2(), score, progress);
}

at::Tensor RankAllocator::scores() {
  const at::NoGradGuard no_grad;
  return frozen_ ? at::Tensor() : take(none(), true, {});
}

// What `progress` chooses, if anything: the pattern, the masks, the history.
void RankAllocator::choose(bool freezes, const at::Tensor& scores, const at::Tensor& progress,
                           const OptimizerView& optimizer) {
  const at::Tensor kept = meets() ? kept_.clone() : kept_;
  select_triplets_(kept, scores, initial_ranks_, costs_, options_.min_rank(), progress);
  if (meets()) meet(freezes, progress, scores, kept, optimizer);
  kept_ = kept;
  mask(progress);
  record_choice_(choices_, summaries_, progress, scores, kept_, initial_ranks_,
                 options_.freeze_step());
}

// The group's: bits of scores and choice, and whether the adapters will be shrunk.
void RankAllocator::meet(bool freezes, const at::Tensor& progress, const at::Tensor& scores,
                         const at::Tensor& kept, const OptimizerView& optimizer) {
  const kernels::Progress now = progress_of(progress);
  const bool chooses = !frozen_ && now.budget >= 0;
  const bool shrinks =
      chooses && options_.shrink() && (freezes || now.steps == options_.freeze_step());
  const std::vector<at::Tensor> keep = kept.cpu().split_with_sizes(initial_ranks_);
  const std::vector<at::Tensor> values =
      chooses ? scores.cpu().split_with_sizes(initial_ranks_) : std::vector<at::Tensor>();
  Decision mine{freezes, now.steps, now.skipped_steps, now.budget};
  for (size_t m = 0; m < adapters_.size(); ++m) {
    Digest scored, chosen;
    if (chooses) scored.add(values[m]);
    chosen.add(keep[m]);
    if (shrinks) chosen.add(int64_t{can_move(adapters_[m], optimizer)});
    mine.scores.push_back(scored.value());
    mine.choices.push_back(chosen.value());
  }
  agree(mine);
}

void RankAllocator::freeze_pattern(const OptimizerView& optimizer) {
  frozen_ = true;
  budgets_ = at::full({1}, schedule_.final_budget(), budgets_.options());
  sensitivity_.clear();
  uncertainty_.clear();
  if (options_.shrink()) shrink(optimizer);
}

void RankAllocator::mask(const at::Tensor& progress) {
  std::vector<at::Tensor> lora_E;
  for (const Adapter& adapter : adapters_) lora_E.push_back(adapter.lora_E);
  mask_triplets_(lora_E, initial_ranks_, kept_, progress);
}

void RankAllocator::shrink(const OptimizerView& optimizer) {
  for (const Adapter& adapter : adapters_) {
    if (can_move(adapter, optimizer)) continue;
    TORCH_WARN("RankAllocator: the optimizer's state of '", adapter.name,
               "' cannot follow its directions, so adapters are masked in each step in place of "
               "being shrunk");
    return;
  }
  const std::vector<at::Tensor> kept = kept_.cpu().split_with_sizes(initial_ranks_);
  for (size_t m = 0; m < adapters_.size(); ++m) {
    Adapter& adapter = adapters_[m];
    const at::Tensor directions = kept[m].nonzero().squeeze(1);
    keep_directions(adapter, directions, optimizer);
    note_order(m, directions);
    adapter.change_rank(directions.numel());
  }
  shrunk_ = true;
}

// Where the next step will write them.
std::vector<at::Tensor> RankAllocator::averages() {
  fit_averages();
  std::vector<at::Tensor> all = sensitivity_;
  all.insert(all.end(), uncertainty_.begin(), uncertainty_.end());
  return all;
}

// Puts the averages where the parameters are, which a module's to() may have moved or widened.
void RankAllocator::fit_averages() {
  for (size_t i = 0; i < factors_.size(); ++i) {
    const auto dtype = at::toOpMathType(factors_[i].scalar_type());
    for (at::Tensor* average : {&sensitivity_[i], &uncertainty_[i]}) {
      if (average->scalar_type() != dtype || average->device() != factors_[i].device())
        *average = average->to(factors_[i].device(), dtype);
    }
  }
}

}  // namespace rankwise
