// AdaLoRAOptions and BudgetSchedule: validation and the cubic schedule.
#include <rankwise/budget_schedule.h>

#include <cmath>
#include <sstream>
#include <stdexcept>

namespace rankwise {
namespace {

template <class... Parts>
void require(bool condition, const Parts&... message) {
  if (condition) return;
  std::ostringstream text;
  text << "AdaLoRA: ";
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

void require_decay(const char* name, double value) {
  require(value >= 0 && value < 1, name, " must be in [0, 1), got ", value);
}

}  // namespace

void AdaLoRAOptions::check() const {
  const AllocationSettings& s = settings_;
  require(initial_rank_ >= 1, "initial_rank must be at least 1, got ", initial_rank_);
  require(s.target_rank >= 0 && s.target_rank <= initial_rank_,
          "target_rank must be from 0 to initial_rank ", initial_rank_,
          " (ranks are pruned, never grown), got ", s.target_rank);
  require(s.total_steps >= 1, "total_steps must be the optimizer steps of the whole training, got ",
          s.total_steps);
  require(s.warmup_steps >= 0, "warmup_steps must be at least 0, got ", s.warmup_steps);
  require(s.final_steps >= 0, "final_steps must be at least 0, got ", s.final_steps);
  // Compared without their sum, which might overflow.
  require(s.warmup_steps < s.total_steps && s.final_steps < s.total_steps - s.warmup_steps,
          "warmup_steps + final_steps must be less than total_steps ", s.total_steps,
          ", for pruning happens between them, got ", s.warmup_steps, " + ", s.final_steps);
  require(s.allocation_interval >= 1, "allocation_interval must be at least 1, got ",
          s.allocation_interval);
  require_decay("beta1", s.beta1);
  require_decay("beta2", s.beta2);
  require(s.min_rank >= 0 && s.min_rank <= s.target_rank, "min_rank must be from 0 to target_rank ",
          s.target_rank, ", got ", s.min_rank);
}

BudgetSchedule::BudgetSchedule(int64_t initial_budget, int64_t final_budget,
                               const AdaLoRAOptions& options)
    : initial_budget_(initial_budget), final_budget_(final_budget), options_(options) {
  options_.check();
  require(final_budget >= 0 && final_budget <= initial_budget,
          "the final budget must be from 0 to the initial budget ", initial_budget, ", got ",
          final_budget);
}

int64_t BudgetSchedule::budget(int64_t step) const {
  const int64_t warmup = options_.warmup_steps(), freeze = options_.freeze_step();
  if (step <= warmup) return initial_budget_;
  if (step >= freeze) return final_budget_;
  const double rest = 1 - static_cast<double>(step - warmup) / static_cast<double>(freeze - warmup);
  const auto span = static_cast<double>(initial_budget_ - final_budget_);
  return static_cast<int64_t>(span * std::pow(rest, 3.0) + static_cast<double>(final_budget_));
}

bool BudgetSchedule::allocates(int64_t step) const {
  if (step <= options_.warmup_steps() || step > options_.freeze_step()) return false;
  return step == options_.freeze_step() || step % options_.allocation_interval() == 0;
}

}  // namespace rankwise
