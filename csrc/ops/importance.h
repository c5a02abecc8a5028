// AdaLoRA's passes over all adapters at once, as typed calls into the dispatcher. Lists hold one
// tensor for each factor; nothing here needs a gradient. Formulas: kernels/allocation/importance.h.
// On CUDA nothing waits for the device: what a step does depends on `progress`
// (kernels/allocation/progress.h), which lies where the adapters are.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include "../kernels/allocation/progress.h"

namespace rankwise {

// As a tensor on the CPU, and back from any device, for which it waits.
at::Tensor tensor_of(const kernels::Progress& progress);
kernels::Progress progress_of(const at::Tensor& progress);

// bool [2]: is anything in the gradients infinite or NaN; is anything not zero.
at::Tensor importance_check(at::TensorList gradients);

// The progress after one more optimizer step. found: importance_check's; found_inf: one number, not
// zero when the optimizer left its step out. budgets: int64, of steps 0, 1, ..., negative for steps
// that choose nothing; the last one is also that of all later steps.
at::Tensor schedule_step(const at::Tensor& progress, const std::optional<at::Tensor>& found,
                         const std::optional<at::Tensor>& found_inf, const at::Tensor& budgets,
                         int64_t freeze_step);

// Takes the gradients into the moving averages, element by element, and with `score` returns the
// scores of the leading ranks[m] directions of every adapter m, one after the other, float64:
// s(E_i) + mean over j of s(A_ij) + mean over j of s(B_ji); else an empty tensor.
//
// The lists hold A [capacity, in], B [out, capacity] and E [capacity, 1] of each adapter in turn. A
// factor without a gradient keeps its averages, which are float64 for float64 parameters and
// float32 for all others. With `progress`, only a step that updates them does, and scores are
// written only where it chooses.
at::Tensor importance_step_(at::TensorList parameters,
                            const c10::List<std::optional<at::Tensor>>& gradients,
                            at::TensorList sensitivity, at::TensorList uncertainty,
                            at::IntArrayRef ranks, double beta1, double beta2, bool score,
                            const std::optional<at::Tensor>& progress = {});

// The three that follow do nothing where the progress has no budget.
//
// Sets which directions to keep, bool like scores: first the best min_rank of every adapter, then
// the best of all while their costs (of one direction of adapter m: costs[m]) fit into the budget.
// Equal scores are taken in the order of adapters and directions.
void select_triplets_(const at::Tensor& kept, const at::Tensor& scores, at::IntArrayRef ranks,
                      at::IntArrayRef costs, int64_t min_rank, const at::Tensor& progress);

// Sets E_i to zero where kept is false, in the leading ranks[m] directions of every adapter m.
void mask_triplets_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept,
                    const at::Tensor& progress);

// Writes a choice into row `recorded` of the history, which must have it, and counts the row when
// it brings another budget or other ranks than the last one, or is that of freeze_step.
// choices: int64 [rows, 2 + adapters], of step, budget and ranks; summaries: float64 [rows, 4], the
// scores' mean and largest, the lowest kept and the highest pruned, NaN where there is none.
void record_choice_(const at::Tensor& choices, const at::Tensor& summaries,
                    const at::Tensor& progress, const at::Tensor& scores, const at::Tensor& kept,
                    at::IntArrayRef ranks, int64_t freeze_step);

}  // namespace rankwise
