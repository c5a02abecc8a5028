// Truncation and combination of updates.
#include <ATen/ATen.h>
#include <rankwise/analysis.h>

#include <algorithm>
#include <cmath>

#include "dense_combination.h"
#include "factors.h"

namespace rankwise::analysis {
namespace {

// The first directions as an update that is otherwise like `like`.
Approximation approximated(const DeltaSpectrum& exact, std::optional<int64_t> rank,
                           const AdapterUpdate& like) {
  const int64_t there = exact.S.numel(), kept = std::min(there, rank.value_or(there));
  const at::Tensor root = exact.S.narrow(0, 0, kept).sqrt();
  Approximation result;
  result.update.module = like.module;
  result.update.embedding = like.embedding;
  result.update.lora_A = (exact.V.narrow(1, 0, kept) * root).t().contiguous();
  result.update.lora_B = (exact.U.narrow(1, 0, kept) * root).contiguous();
  const double norm = norm_of(exact.S);
  result.error = norm_of(exact.S.narrow(0, kept, there - kept));
  result.relative_error = norm > 0 ? result.error / norm : 0;
  return result;
}

void check_rank(const std::string& function, int64_t rank) {
  if (rank < 0) fail(function, "rank must be at least 0, got " + std::to_string(rank));
}

void check_options(size_t count, const std::vector<double>& weights,
                   const CombineOptions& options) {
  if (count == 0) fail("combine", "there must be at least one update, got none");
  if (weights.size() != count)
    fail("combine", "weights must be " + std::to_string(count) + " like the updates, got " +
                        std::to_string(weights.size()));
  for (const double weight : weights)
    if (!std::isfinite(weight))
      fail("combine", "weights must be finite, got " + std::to_string(weight));
  if (options.rank) check_rank("combine", *options.rank);
  if (options.method == Combination::linear) return;
  if (!options.rank)
    fail("combine", "rank must be given where the method is not linear: its result may have any");
  if (!(options.density > 0 && options.density <= 1))
    fail("combine",
         "density must be above 0 and at most 1, got " + std::to_string(options.density));
}

// sum w_i B_i A_i as one product, without the rounding that is left of directions that cancel.
DeltaSpectrum linear(const std::vector<Factors>& factors, const std::vector<double>& weights) {
  std::vector<at::Tensor> A, B;
  for (size_t i = 0; i < factors.size(); ++i) {
    A.push_back(factors[i].A);
    B.push_back(factors[i].B * weights[i]);
  }
  const Factors sum{at::cat(A, 0), at::cat(B, 1)};
  const double terms = (sum.B.norm(2, 0) * sum.A.norm(2, 1)).sum().item<double>();
  return above(1e-15 * terms, spectrum_of(sum));
}

DeltaSpectrum dense(const std::vector<Factors>& factors, const std::vector<double>& weights,
                    const CombineOptions& options) {
  const auto [U, S, Vh] =
      at::linalg_svd(dense_combination(factors, weights, options), /*full_matrices=*/false);
  return known({U, S, Vh.t()});
}

}  // namespace

Approximation truncate(const AdapterUpdate& update, int64_t rank) {
  check_rank("truncate", rank);
  return on_one_thread([&] {
    return approximated(linear({factors_of("truncate", "update", update)}, {1}), rank, update);
  });
}

Approximation combine(const std::vector<AdapterUpdate>& updates, const std::vector<double>& weights,
                      const CombineOptions& options) {
  check_options(updates.size(), weights, options);
  return on_one_thread([&] {
    std::vector<Factors> factors;
    for (size_t i = 0; i < updates.size(); ++i) {
      const std::string argument = "updates[" + std::to_string(i) + "]";
      factors.push_back(factors_of("combine", argument, updates[i]));
      const std::string name = named(argument, updates[i]);
      check_same_shape("combine", name, factors[i], "updates[0]", factors[0]);
      if (updates[i].embedding != updates[0].embedding)
        fail("combine", name + " must be of " + (updates[0].embedding ? "an" : "no") +
                            " embedding like updates[0], got the other");
    }
    const bool exact = options.method == Combination::linear;
    return approximated(exact ? linear(factors, weights) : dense(factors, weights, options),
                        options.rank, updates[0]);
  });
}

}  // namespace rankwise::analysis
