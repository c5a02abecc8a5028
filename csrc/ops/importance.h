// AdaLoRA's passes over all adapters at once, as typed calls into the dispatcher. Lists hold one
// tensor for each factor; nothing here needs a gradient. Formulas: kernels/importance.h.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

namespace rankwise {

// bool [2]: is anything in the gradients infinite or NaN; is anything not zero.
at::Tensor importance_check(at::TensorList gradients);

// Takes the gradients into the moving averages, element by element, and with `score` returns the
// scores of the leading ranks[m] directions of every adapter m, one after the other, float64:
// s(E_i) + mean over j of s(A_ij) + mean over j of s(B_ji); else an empty tensor.
//
// The lists hold A [capacity, in], B [out, capacity] and E [capacity, 1] of each adapter in turn. A
// factor without a gradient keeps its averages, which are float64 for float64 parameters and
// float32 for all others.
at::Tensor importance_step_(at::TensorList parameters,
                            const c10::List<std::optional<at::Tensor>>& gradients,
                            at::TensorList sensitivity, at::TensorList uncertainty,
                            at::IntArrayRef ranks, double beta1, double beta2, bool score);

// Which directions to keep, bool like scores: first the best min_rank of every adapter, then the
// best of all while their costs (of one direction of adapter m: costs[m]) fit into the budget.
// Equal scores are taken in the order of adapters and directions.
at::Tensor select_triplets(const at::Tensor& scores, at::IntArrayRef ranks, at::IntArrayRef costs,
                           int64_t budget, int64_t min_rank);

// Sets E_i to zero where kept is false, in the leading ranks[m] directions of every adapter m.
// `kept` may lie on the CPU whatever the device.
void mask_triplets_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept);

}  // namespace rankwise
