// Singular directions of low-rank updates.
#include "spectrum.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace rankwise {
namespace {

constexpr double smallest = 1e-12;  // of the largest singular value; below it vectors are rounding

at::Tensor indices(const std::vector<int64_t>& values) {
  return at::tensor(values, at::kLong);
}

}  // namespace

at::Tensor doubles(const at::Tensor& tensor) {
  return tensor.detach().to(at::kCPU, at::kDouble).contiguous();
}

bool Spectrum::empty(int64_t i) const {
  const auto* const s = S.const_data_ptr<double>();
  return !(s[i] > smallest * s[0]);
}

Spectrum spectrum_of(const at::Tensor& A, const at::Tensor& B) {
  const auto [Qb, Rb] = at::linalg_qr(B, "reduced");
  const auto [Qa, Ra] = at::linalg_qr(A.t(), "reduced");
  const auto [U, S, Vh] = at::linalg_svd(Rb.matmul(Ra.t()), /*full_matrices=*/false);
  Spectrum found;
  found.U = Qb.matmul(U).contiguous();
  found.S = S.contiguous();
  found.V = Qa.matmul(Vh.t()).contiguous();
  found.BU = Rb.t().matmul(U).contiguous();
  found.AV = Ra.t().matmul(Vh.t()).contiguous();
  return found;
}

at::Tensor singular_gradients(const Spectrum& spectrum, const at::Tensor& gA,
                              const at::Tensor& gB) {
  const at::Tensor by_B = (spectrum.U.t().matmul(gB) * spectrum.BU.t()).sum(1);
  const at::Tensor by_A = (gA.matmul(spectrum.V) * spectrum.AV).sum(0);
  at::Tensor gradients = (by_A + by_B) / (2 * spectrum.S);
  for (int64_t i = 0; i < gradients.numel(); ++i)
    if (spectrum.empty(i)) gradients[i] = 0;
  return gradients;
}

std::vector<int64_t> continued(const Spectrum& spectrum, const at::Tensor& A, const at::Tensor& B) {
  const int64_t rank = spectrum.S.numel();
  const auto normalised = [](const at::Tensor& lengths) { return lengths.clamp_min(1e-300); };
  const at::Tensor overlap = ((spectrum.BU.abs() / normalised(B.norm(2, 0)).unsqueeze(1)) *
                              (spectrum.AV.abs() / normalised(A.norm(2, 1)).unsqueeze(1)))
                                 .contiguous();  // [column, direction]
  const auto* const value = overlap.const_data_ptr<double>();
  std::vector<std::tuple<double, int64_t, int64_t>> pairs;
  for (int64_t column = 0; column < rank; ++column)
    for (int64_t i = 0; i < rank; ++i) pairs.emplace_back(-value[column * rank + i], column, i);
  std::ranges::sort(pairs);
  std::vector<int64_t> direction(rank, -1);
  std::vector<bool> taken(rank, false);
  for (const auto& [negative, column, i] : pairs) {
    if (direction[column] >= 0 || taken[i]) continue;
    direction[column] = i;
    taken[i] = true;
  }
  return direction;
}

Repacked repacked(const Spectrum& spectrum, const std::vector<int64_t>& kept,
                  const std::vector<double>& lengths) {
  const at::Tensor chosen = indices(kept), all = at::tensor(lengths, at::kDouble);
  const at::Tensor s = spectrum.S.index_select(0, chosen), a = all.index_select(0, chosen);
  Repacked result;
  result.A = a.unsqueeze(1) * spectrum.V.index_select(1, chosen).t();
  result.B = spectrum.U.index_select(1, chosen) * (s / a);
  result.T_A = spectrum.BU.index_select(1, chosen) * (a / s);
  result.T_B = spectrum.AV.index_select(1, chosen) / a;
  for (size_t i = 0; i < kept.size(); ++i) {
    if (!spectrum.empty(kept[i])) continue;
    for (at::Tensor* tensor : {&result.B, &result.T_A, &result.T_B})
      tensor->select(1, static_cast<int64_t>(i)).zero_();
  }
  return result;
}

double row_length(const at::Tensor& A) {
  if (A.size(0) == 0) return std::sqrt(1.0 / 3);  // uniform in +-1/sqrt(in)
  const double median = A.norm(2, 1).median().item<double>();
  return median > 0 ? median : std::sqrt(1.0 / 3);
}

at::Tensor fresh_rows(const at::Tensor& A, const at::Tensor& preferred, int64_t count,
                      uint64_t seed) {
  const int64_t known = preferred.defined() ? std::min(preferred.size(0), count) : 0;
  auto generator = at::detail::createCPUGenerator(seed);
  const at::Tensor random = at::randn({count - known, A.size(1)}, generator, A.options());
  const at::Tensor all =
      (known > 0 ? at::cat({A, preferred.narrow(0, 0, known), random}) : at::cat({A, random})).t();
  const auto [Q, R] = at::linalg_qr(all, "reduced");
  return Q.narrow(1, A.size(0), count).t().contiguous();
}

}  // namespace rankwise
