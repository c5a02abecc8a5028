// Tensors as the matrices that products and kernels take.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

namespace rankwise {

// A 2-D view [tokens, features] with unit column stride and non-overlapping rows; a copy only when
// the strides allow no such view.
at::Tensor matrix(const at::Tensor& tensor);

// A contiguous matrix in another shape of as many elements: itself where it has that shape.
at::Tensor in_shape(const at::Tensor& matrix, at::IntArrayRef shape);

// Zero rows (dim 0) or columns (dim 1) behind the active ones, up to the full factor's size.
at::Tensor padded(const at::Tensor& active, int64_t dim, const c10::SymInt& capacity);

}  // namespace rankwise
