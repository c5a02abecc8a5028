// The large product of a layer on the device, alone or added to what a kernel has written.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace rankwise {

// out = left right + bias: cuBLASLt, sums in float32, rounded once, on the current stream.
// out [m, n] and left [m, k] have unit column stride, right [k, n] any strides, bias is [n]; no
// size is 0; one dtype (bfloat16, float16, float32; TF32 only where PyTorch's settings allow it).
// The same shapes, strides and alignments give the same bits.
void multiply_base(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right,
                   const std::optional<at::Tensor>& bias);

// out += left right, likewise.
void add_base(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right);

}  // namespace rankwise
