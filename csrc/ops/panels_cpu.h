// float32 products in panels of columns: the right operand is packed a panel at a time, in the
// order in which oneDNN's micro-kernel (at::native::cpublas::brgemm) reads it, and stays in the
// core's cache while all rows pass by. On the calling thread.
#pragma once

#include <ATen/core/Tensor.h>

namespace rankwise {

// Columns of a panel: four AVX-512 registers.
constexpr int64_t panel_cols = 64;

// Whether panels serve a product with this result and inner size: float32, enough rows to pay for
// packing, an inner size whose sum is as accurate as MKL's, and a processor for which oneDNN has
// the kernel. Depends on type, shape and machine alone.
bool in_panels(const at::Tensor& out, int64_t inner);

// out = alpha * a b + start for a [rows, inner] and out with unit column strides, b [inner, cols]
// of any strides, and an inner size that in_panels accepts. `start` is out itself, a row [cols], or
// undefined for zero.
void multiply_panels(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double alpha,
                     const at::Tensor& start);

// The same for few rows and a long inner size, which packs a instead, of any strides; b and out
// have unit column strides. out = alpha * a b, or is added to.
void multiply_few_rows(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double alpha,
                       bool accumulate);

// Whether the kernel is there for tensors of this type.
bool panels_serve(at::ScalarType dtype);

}  // namespace rankwise
