// Where an AdaLoRA training stands and what its last step does, in memory beside the adapters: a
// step that is left out because of its gradients shifts the schedule, and on a device the host does
// not wait to learn of it. The same arithmetic on host and device.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace rankwise::kernels {

// As a tensor: int64 [6].
struct Progress {
  int64_t steps = 0;          // taken into the scores
  int64_t skipped_steps = 0;  // left out
  int64_t budget = 0;         // of the last step's choice; negative where it chooses nothing
  int64_t updates = 0;        // 1 where the last step's gradients belong into the averages
  int64_t zeros = 0;          // 1 once all gradients of a step were zero
  int64_t recorded = 0;       // rows of the history
};

// After one more optimizer step. `found` is null or an importance check's; `left_out`: the
// optimizer left the parameters alone. budgets[t] is that of step t, negative where nothing is
// chosen; steps behind its end have the last one.
RANKWISE_HOST_DEVICE inline Progress after_step(Progress p, const bool* found, bool left_out,
                                                const int64_t* budgets, int64_t count,
                                                int64_t freeze_step) {
  p.budget = -1;
  p.updates = 0;
  if (left_out || (found && found[0])) {
    ++p.skipped_steps;
    return p;
  }
  ++p.steps;
  p.budget = budgets[p.steps < count ? p.steps : count - 1];
  // As the paper's code and PEFT: the last choice uses the scores of the step before.
  p.updates = p.steps < freeze_step;
  if (found && !found[1]) p.zeros = 1;
  return p;
}

}  // namespace rankwise::kernels
