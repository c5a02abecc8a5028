// Gradients of what is trained of a base, on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace rankwise {

// dy^T x, [out, in], of dy [tokens, out] and x [tokens, in].
at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x);

// The sum of dy's rows, [out].
at::Tensor bias_gradient(const at::Tensor& dy);

}  // namespace rankwise
