// TIES, DARE and pruning by magnitude, as PEFT's merge_utils.py defines them.
#include "dense_combination.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <random>

namespace rankwise::analysis {
namespace {

// Zero but for the `density` part of the elements of the largest magnitude, rounded down.
at::Tensor trimmed(const at::Tensor& dense, double density) {
  const auto kept = static_cast<int64_t>(density * static_cast<double>(dense.numel()));
  const at::Tensor flat = dense.flatten();
  const at::Tensor places = std::get<1>(flat.abs().topk(kept));
  return at::zeros_like(flat).index_copy(0, places, flat.index_select(0, places)).view_as(dense);
}

// Each element kept with the probability `density`, then divided by it.
at::Tensor thinned(const at::Tensor& dense, double density, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  const at::Tensor drawn = at::rand(dense.sizes(), generator, dense.options());
  return at::where(drawn < density, dense / density, 0);
}

class Updates {
 public:
  Updates(const std::vector<Factors>& factors, const CombineOptions& options)
      : factors_(factors), options_(options) {
    std::mt19937_64 seeds(options.seed);
    for (size_t i = 0; i < factors.size(); ++i) seeds_.push_back(seeds());
  }

  // An update as it takes part: the same at every call.
  at::Tensor operator[](size_t i) const {
    const at::Tensor dense = factors_[i].B.matmul(factors_[i].A);
    if (options_.density == 1) return dense;
    const bool random =
        options_.method == Combination::dare_linear || options_.method == Combination::dare_ties;
    return random ? thinned(dense, options_.density, seeds_[i]) : trimmed(dense, options_.density);
  }

  size_t size() const { return factors_.size(); }
  at::Tensor zeros() const {
    return at::zeros({factors_[0].out(), factors_[0].in()}, factors_[0].A.options());
  }

 private:
  const std::vector<Factors>& factors_;
  const CombineOptions& options_;
  std::vector<uint64_t> seeds_;
};

// The sign of each element's sum, or of its signs' sum; of zero +1.
at::Tensor elected(const Updates& updates, bool by_count) {
  at::Tensor sum = updates.zeros();
  for (size_t i = 0; i < updates.size(); ++i) sum += by_count ? updates[i].sign() : updates[i];
  return at::where(sum >= 0, at::ones_like(sum), -1);
}

}  // namespace

at::Tensor dense_combination(const std::vector<Factors>& factors,
                             const std::vector<double>& weights, const CombineOptions& options) {
  const Updates updates(factors, options);
  at::Tensor sum = updates.zeros();
  const bool ties = options.method == Combination::ties || options.method == Combination::dare_ties;
  if (!ties) {
    for (size_t i = 0; i < updates.size(); ++i) sum.add_(updates[i], weights[i]);
    return sum;
  }
  const at::Tensor sign = elected(updates, options.sign_by_count);
  at::Tensor count = updates.zeros();
  for (size_t i = 0; i < updates.size(); ++i) {
    const at::Tensor update = updates[i], agrees = update.sign() == sign;
    sum.add_(update * agrees, weights[i]);
    count.add_(agrees);
  }
  return sum / count.clamp_min(1);
}

}  // namespace rankwise::analysis
