// Products in runs.
#include "products.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace rankwise {

Split runs(const at::Tensor& out, int64_t inner, int64_t run) {
  const bool whole = out.element_size() == 2 || inner <= 2 * run;
  return {inner, whole ? std::max<int64_t>(inner, 1) : run};
}

void multiply_into(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double alpha,
                   const at::Tensor& add) {
  const Split pieces = runs(out, a.size(1), base_run);
  for (int64_t i = 0; i < std::max<int64_t>(pieces.count(), 1); ++i) {
    const Range run = pieces[i];
    at::addmm_out(out, i == 0 && add.defined() ? add.to(out.scalar_type()) : out, run.of(a, 1),
                  run.of(b, 0), /*beta=*/i > 0 || add.defined(), alpha);
  }
}

}  // namespace rankwise
