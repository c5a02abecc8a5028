// AllocationSettings: AdaLoRA's schedule as plain values. No torch here.
#pragma once

#include <cstdint>

namespace rankwise {

/// What a budget counts: triplets, as in the paper, or parameters, of which a triplet of an
/// [out, in] layer has in + out.
enum class BudgetUnit { triplets, parameters };

/// How AdaLoRA (arXiv 2303.10512) chooses ranks: what AdaLoRAOptions set and check, adapters keep
/// and folders carry. What an adapter computes does not depend on it. Steps are optimizer steps.
/// PEFT's file names are given; the last three it does not have.
struct AllocationSettings {
  int64_t target_rank = 8;            ///< `target_r`: mean rank at the end, 0 .. initial rank
  int64_t total_steps = 0;            ///< `total_step`: of the whole training, >= 1
  int64_t warmup_steps = 0;           ///< `tinit`: steps at the start that prune nothing
  int64_t final_steps = 0;            ///< `tfinal`: steps at the end with the pattern frozen
  int64_t allocation_interval = 1;    ///< `deltaT`: steps between two allocations, >= 1
  double beta1 = 0.85;                ///< decay of the sensitivity's average, [0, 1)
  double beta2 = 0.85;                ///< decay of the uncertainty's average, [0, 1)
  double orthogonality_weight = 0.5;  ///< `orth_reg_weight` in PEFT's loss, >= 0; carried, not used
  BudgetUnit budget_unit = BudgetUnit::triplets;
  int64_t min_rank = 0;  ///< directions every adapter keeps, <= target_rank
  bool shrink = true;    ///< move kept directions to the front when the pattern freezes

  bool operator==(const AllocationSettings&) const = default;
};

}  // namespace rankwise
