// Gradients of active directions as those of whole factors.
#include "adapter.h"

namespace rankwise {

at::Tensor in_capacity(const at::Tensor& active, const at::Tensor& factor, int64_t dim) {
  const bool whole = active.size(dim) == factor.size(dim);
  if (whole && active.is_contiguous() && active.scalar_type() == factor.scalar_type())
    return active;
  const at::Tensor full = whole ? at::empty(factor.sizes(), factor.options())
                                : at::zeros(factor.sizes(), factor.options());
  full.narrow(dim, 0, active.size(dim)).copy_(active);
  return full;
}

}  // namespace rankwise
