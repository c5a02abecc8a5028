// Gradients of probes: how much an adapter's directions do not see, and where it lies.
#include "gradient_sketch.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

namespace rankwise {

at::Tensor probe_columns(int64_t out, int64_t count, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  return at::randn({out, count}, generator, at::kDouble) * probe_size;
}

GradientSketch sketch_of(const at::Tensor& gradient, const at::Tensor& V, double scaling) {
  GradientSketch sketch{.rows = gradient.narrow(0, 0, 0)};
  if (scaling == 0) return sketch;
  at::Tensor seen = gradient / (scaling * probe_size);
  if (V.defined()) seen = seen - seen.matmul(V).matmul(V.t());
  const auto [U, S, Vh] = at::linalg_svd(seen, /*full_matrices=*/false);
  sketch.energy = S.square().sum().item<double>() / static_cast<double>(gradient.size(0));
  const int64_t known = (S > 1e-12 * S.max()).sum().item<int64_t>();
  sketch.rows = Vh.narrow(0, 0, known);
  return sketch;
}

}  // namespace rankwise
