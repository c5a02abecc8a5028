// Views as matrices, and copies where there is no such view.
#include "matrices.h"

#include <ATen/ATen.h>

#include "checks.h"

namespace rankwise {

at::Tensor matrix(const at::Tensor& tensor) {
  const int64_t cols = tensor.size(-1);
  const at::Tensor view = tensor.dim() == 2 ? tensor : tensor.reshape({token_count(tensor), cols});
  const bool plain = cols <= 1 || view.stride(1) == 1;
  return plain && (view.size(0) <= 1 || view.stride(0) >= cols) ? view : view.contiguous();
}

at::Tensor in_shape(const at::Tensor& matrix, at::IntArrayRef shape) {
  return matrix.sizes() == shape ? matrix : matrix.view(shape);
}

at::Tensor padded(const at::Tensor& active, int64_t dim, const c10::SymInt& capacity) {
  const c10::SymInt missing = capacity - active.sym_size(dim);
  if (dim == 0) return at::constant_pad_nd_symint(active, {0, 0, 0, missing});
  return at::constant_pad_nd_symint(active, {0, missing});
}

}  // namespace rankwise
