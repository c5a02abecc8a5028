// AdaLoRA's options and the budget they give after each optimizer step. No tensors here.
#pragma once

#include <rankwise/allocation_settings.h>
#include <torch/arg.h>

#include <cstdint>

namespace rankwise {

/// AdaLoRA (arXiv 2303.10512), by chained setters; meaning and defaults in AllocationSettings.
/// Steps are counted from 1.
class AdaLoRAOptions {
 public:
  AdaLoRAOptions() = default;
  AdaLoRAOptions(int64_t initial_rank, const AllocationSettings& settings)
      : initial_rank_(initial_rank), settings_(settings) {}

#define RANKWISE_ALLOCATION_ARG(T, name)                   \
  AdaLoRAOptions& name(T value) {                          \
    settings_.name = value;                                \
    return *this;                                          \
  }                                                        \
  const decltype(AllocationSettings::name)& name() const { \
    return settings_.name;                                 \
  }
  RANKWISE_ALLOCATION_ARG(int64_t, target_rank)
  RANKWISE_ALLOCATION_ARG(int64_t, total_steps)
  RANKWISE_ALLOCATION_ARG(int64_t, warmup_steps)
  RANKWISE_ALLOCATION_ARG(int64_t, final_steps)
  RANKWISE_ALLOCATION_ARG(int64_t, allocation_interval)
  RANKWISE_ALLOCATION_ARG(double, beta1)
  RANKWISE_ALLOCATION_ARG(double, beta2)
  RANKWISE_ALLOCATION_ARG(BudgetUnit, budget_unit)
  RANKWISE_ALLOCATION_ARG(int64_t, min_rank)
  RANKWISE_ALLOCATION_ARG(bool, shrink)
#undef RANKWISE_ALLOCATION_ARG
  TORCH_ARG(int64_t, initial_rank) = 12;  ///< of every adapter at the start, >= 1

 public:
  const AllocationSettings& settings() const {
    return settings_;
  }

  /// The step after which the pattern is frozen: total_steps - final_steps.
  int64_t freeze_step() const {
    return settings_.total_steps - settings_.final_steps;
  }

  /// Throws std::invalid_argument naming the option, what was wanted and what came.
  void check() const;

 private:
  AllocationSettings settings_;
};

/// How much is kept after each step: the initial budget up to warmup_steps, then
///
///   b(t) = b_T + (b_0 - b_T) (1 - (t - warmup) / (freeze - warmup))^3,   rounded down,
///
/// and from freeze_step on the final budget b_T. This is the schedule the paper's code and PEFT
/// compute; the paper's equation 14 misprints the fraction.
class BudgetSchedule {
 public:
  /// Throws std::invalid_argument for wrong options, or unless 0 <= final_budget <= initial_budget.
  BudgetSchedule(int64_t initial_budget, int64_t final_budget, const AdaLoRAOptions& options);

  int64_t initial_budget() const { return initial_budget_; }
  int64_t final_budget() const { return final_budget_; }

  /// The budget after `step` steps.
  int64_t budget(int64_t step) const;

  /// Whether directions are chosen anew after `step`: every allocation_interval steps between
  /// warm-up and freeze_step, and at freeze_step.
  bool allocates(int64_t step) const;

 private:
  int64_t initial_budget_, final_budget_;
  AdaLoRAOptions options_;
};

}  // namespace rankwise
