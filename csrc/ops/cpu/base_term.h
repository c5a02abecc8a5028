// What a low-rank update is added to on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "adapter.h"

namespace rankwise {

// x W0^T + bias, or rows that somebody else computed.
struct BaseTerm {
  at::Tensor weight;  // [out, in]; undefined where the rows are given
  at::Tensor bias;    // [out], or undefined
  at::Tensor rows;    // [tokens, out], any strides; undefined beside a weight
};

struct Projected {
  std::vector<at::Tensor> y;  // of each layer, [tokens, out]
  at::Tensor hidden;          // drop(x) A^T of all, [tokens, rank]
};

// What the gradients of a layer come from, besides its adapter.
struct OutputTerm {
  at::Tensor dy;      // [tokens, out]
  at::Tensor weight;  // [out, in] adds dy W0 to x's gradient; undefined, nothing is added
};

// Gradients of x, of all layers' A [rank, in], and of each one's B [out, rank] and E [rank, 1];
// undefined where not asked for.
struct FactorGradients {
  at::Tensor x, A;
  std::vector<at::Tensor> B, E;
};

}  // namespace rankwise
