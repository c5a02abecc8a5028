// AdaLoRA's options and the budget they give after each optimizer step. No tensors here.
#pragma once

#include <torch/arg.h>

#include <cstdint>

namespace rankwise {

/// What a budget counts: triplets, as in the paper, or parameters, of which a triplet of an
/// [out, in] layer has in + out.
enum class BudgetUnit { triplets, parameters };

/// AdaLoRA (arXiv 2303.10512). Steps are optimizer steps, counted from 1.
class AdaLoRAOptions {
 public:
  TORCH_ARG(int64_t, initial_rank) = 12;        ///< of every adapter at the start, >= 1
  TORCH_ARG(int64_t, target_rank) = 8;          ///< mean rank at the end, 0 .. initial_rank
  TORCH_ARG(int64_t, total_steps) = 0;          ///< of the whole training, >= 1
  TORCH_ARG(int64_t, warmup_steps) = 0;         ///< steps at the start that prune nothing
  TORCH_ARG(int64_t, final_steps) = 0;          ///< steps at the end with the pattern frozen
  TORCH_ARG(int64_t, allocation_interval) = 1;  ///< steps between two allocations, >= 1
  TORCH_ARG(double, beta1) = 0.85;              ///< decay of the sensitivity's average, [0, 1)
  TORCH_ARG(double, beta2) = 0.85;              ///< decay of the uncertainty's average, [0, 1)
  TORCH_ARG(BudgetUnit, budget_unit) = BudgetUnit::triplets;
  TORCH_ARG(int64_t, min_rank) = 0;  ///< directions every adapter keeps, <= target_rank
  TORCH_ARG(bool, shrink) = true;    ///< move kept directions to the front when the pattern freezes

 public:
  /// The step after which the pattern is frozen: total_steps - final_steps.
  int64_t freeze_step() const { return total_steps_ - final_steps_; }

  /// Throws std::invalid_argument naming the option, what was wanted and what came.
  void check() const;
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
