// An update beside the weight that it changes: what it amplifies, and which directions are new.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <rankwise/analysis.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "factors.h"

namespace rankwise::analysis {
namespace {

// W [out, in] in float64 by blocks of rows, so that W itself is never copied whole.
class WeightRows {
 public:
  WeightRows(const std::string& function, const at::Tensor& weight, const Factors& factors)
      : weight_(checked(function, "weight", weight, {factors.out(), factors.in()})),
        rows_(factors.out(), scratch_step(factors.in())) {
    for (int64_t i = 0; i < rows_.count(); ++i) check_finite(function, "weight", block(i));
  }

  int64_t count() const { return rows_.count(); }
  Range range(int64_t i) const { return rows_[i]; }
  at::Tensor block(int64_t i) const { return rows_[i].of(weight_, 0).to(at::kCPU, at::kDouble); }

  // ||U^T W V||_F.
  double along(const at::Tensor& U, const at::Tensor& V) const {
    at::Tensor sum = at::zeros({U.size(1), V.size(1)}, U.options());
    for (int64_t i = 0; i < count(); ++i) sum += range(i).of(U, 0).t().matmul(block(i).matmul(V));
    return norm_of(sum);
  }

  double norm() const {
    double squares = 0;
    for (int64_t i = 0; i < count(); ++i) squares += std::pow(norm_of(block(i)), 2);
    return std::sqrt(squares);
  }

  // The norm of the largest `rank` singular values. The eigenvalues of the Gram matrix are exact to
  // rounding of the largest, which is among them.
  double largest(int64_t rank) const {
    const at::Tensor tall = weight_.size(1) < weight_.size(0) ? weight_ : weight_.t();
    const at::Tensor gram = at::zeros({tall.size(1), tall.size(1)}, at::kDouble);
    const Split rows(tall.size(0), 512);
    for (int64_t i = 0; i < rows.count(); ++i) {
      const at::Tensor part = rows[i].of(tall, 0).to(at::kCPU, at::kDouble);
      gram.addmm_(part.t(), part);
    }
    const at::Tensor rising = at::linalg_eigvalsh(gram);
    const at::Tensor last = rising.narrow(0, rising.numel() - rank, rank);
    return std::sqrt(last.clamp_min(0).sum().item<double>());
  }

 private:
  at::Tensor weight_;
  Split rows_;
};

at::Tensor random_directions(int64_t features, int64_t rank, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  const at::Tensor random = at::randn({features, rank}, generator, at::kDouble);
  return std::get<0>(at::linalg_qr(random, "reduced"));
}

}  // namespace

Amplification amplification_factor(const at::Tensor& weight, const AdapterUpdate& update,
                                   std::optional<int64_t> rank, uint64_t seed, bool own) {
  const std::string function = "amplification_factor";
  if (rank && *rank < 0) fail(function, "rank must be at least 0, got " + std::to_string(*rank));
  return on_one_thread([&] {
    const Factors factors = factors_of(function, "update", update);
    const WeightRows W(function, weight, factors);
    const DeltaSpectrum found = known(spectrum_of(factors));
    const int64_t there = found.S.numel();
    const int64_t k = std::min(there, rank.value_or(there));
    Amplification result{.update_norm = norm_of(found.S), .weight_norm = W.norm(), .rank = k};
    if (!own) result.along_weight = std::numeric_limits<double>::quiet_NaN();
    if (k == 0) return result;
    if (own) result.along_weight = W.largest(k);
    result.along_update = W.along(found.U.narrow(1, 0, k), found.V.narrow(1, 0, k));
    result.along_random = W.along(random_directions(factors.out(), k, 2 * seed),
                                  random_directions(factors.in(), k, 2 * seed + 1));
    result.factor = result.update_norm / result.along_update;
    return result;
  });
}

IntruderDirections intruder_directions(const at::Tensor& weight, const AdapterUpdate& update,
                                       double threshold, int64_t count) {
  const std::string function = "intruder_directions";
  if (!(threshold >= 0 && threshold <= 1))
    fail(function, "threshold must be from 0 to 1, got " + std::to_string(threshold));
  if (count < 1) fail(function, "count must be at least 1, got " + std::to_string(count));
  const Factors factors = factors_of(function, "update", update);
  const at::Tensor W = checked(function, "weight", weight, {factors.out(), factors.in()})
                           .to(at::kCPU, at::kDouble)
                           .contiguous();
  check_finite(function, "weight", W);
  at::Tensor U[2], S[2];
  run_products(2, W.numel(), [&](int64_t i) {  // on two threads where there are two
    const at::Tensor matrix = i == 0 ? W : W + factors.B.matmul(factors.A);
    std::tie(U[i], S[i], std::ignore) = at::linalg_svd(matrix, /*full_matrices=*/false);
  });
  return on_one_thread([&] {
    const int64_t first = std::min(count, S[1].numel());
    IntruderDirections found;
    found.singular_values = S[1].narrow(0, 0, first).clone();
    found.cosines = at::empty({0}, W.options());
    if (first == 0) return found;
    found.cosines =
        std::get<0>(U[0].t().matmul(U[1].narrow(1, 0, first)).abs().max(0)).clamp_max(1);
    for (int64_t i = 0; i < first; ++i)
      if (found.cosines[i].item<double>() < threshold) found.indices.push_back(i);
    return found;
  });
}

}  // namespace rankwise::analysis
