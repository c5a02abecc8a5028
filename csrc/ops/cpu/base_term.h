// What a low-rank update is added to on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "adapter.h"

namespace rankwise {

// x W0^T + bias, or rows that somebody else computed.
struct BaseTerm {
  at::Tensor weight;  // [out, in]; undefined where the rows are given
  at::Tensor bias;    // [out], or undefined
  at::Tensor rows;    // [tokens, out], any strides; undefined beside a weight
};

struct Projected {
  at::Tensor y, hidden;  // [tokens, out]; drop(x) A^T [tokens, rank]
};

// Gradients of x, A [rank, in], B [out, rank] and E [rank, 1]; undefined where not asked for.
struct FactorGradients {
  at::Tensor x, A, B, E;
};

}  // namespace rankwise
