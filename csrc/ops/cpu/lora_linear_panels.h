// lora_linear on oneDNN's micro-kernel: float32, bfloat16, and float32 factors over bfloat16.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "adapter.h"

namespace rankwise {

// Whether panels serve these types and sizes on this processor.
bool in_panels(const at::Tensor& x, const at::Tensor& weight, const ActiveAdapter& adapter);

struct Projected {
  at::Tensor y, hidden;  // [tokens, out]; drop(x) A^T [tokens, rank]
};
Projected forward_in_panels(const ActiveAdapter& adapter, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// Gradients of x, A [rank, in], B [out, rank] and E [rank, 1]; undefined where not asked for.
struct FactorGradients {
  at::Tensor x, A, B, E;
};
FactorGradients backward_in_panels(const ActiveAdapter& adapter, const at::Tensor& dy,
                                   const at::Tensor& x, const at::Tensor& weight,
                                   const at::Tensor& hidden, std::array<bool, 4> output_mask);

}  // namespace rankwise
