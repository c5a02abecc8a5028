// AdaLoRA's schedule and history on the device: launchers over raw pointers, no torch. All pointers
// are device pointers, `stream` is a cudaStream_t, and nothing waits for the device. Launchers
// return the launch's error (cudaError_t) or 0.
#pragma once

#include <cstdint>

#include "../element_type.h"
#include "progress.h"

namespace rankwise::kernels {

// after_step (progress.h).
struct StepSchedule {
  const Progress* before;
  const bool* found;      // null, or an importance check's
  const void* found_inf;  // null, or one number: not zero when the optimizer left the step out
  ElementType type;       // found_inf's
  const int64_t* budgets;
  int64_t count;
  int64_t freeze_step;
  Progress* after;
};
int launch_schedule_step(const StepSchedule& problem, void* stream);

// Writes the choice that a step made into the row behind those recorded, and counts the row unless
// it is the last one again: the same budget and ranks, and not freeze_step. A step without a choice
// changes nothing.
struct ChoiceRecord {
  int64_t adapters, triplets;
  const double* scores;    // [triplets]
  const bool* kept;        // [triplets]
  const int64_t* offsets;  // [adapters + 1], of each adapter's directions
  int64_t freeze_step;
  Progress* progress;
  int64_t* choices;   // rows of step, budget and each adapter's kept directions
  double* summaries;  // rows of mean and largest score, lowest kept, highest pruned or NaN
};
int launch_record_choice(const ChoiceRecord& problem, void* stream);

}  // namespace rankwise::kernels
