// Spectra of updates, how their subspaces overlap, and how many directions count.
#include <ATen/ATen.h>
#include <rankwise/analysis.h>

#include <cmath>

#include "factors.h"

namespace rankwise::analysis {
namespace {

// Orthonormal columns [features, known directions].
at::Tensor directions(const Factors& factors, Subspace of) {
  const at::Tensor one = at::eye(factors.A.size(0), factors.A.options());
  const bool input = of == Subspace::input || of == Subspace::lora_A;
  const DeltaSpectrum found = known(spectrum_of(
      {of == Subspace::lora_B ? one : factors.A, of == Subspace::lora_A ? one : factors.B}));
  return input ? found.V : found.U;
}

// A factor without the other one, without scaling and lora_E.
Factors compared(const char* argument, const AdapterUpdate& update, Subspace of) {
  AdapterUpdate plain = update;
  if (of == Subspace::lora_A || of == Subspace::lora_B) {
    plain.scaling = 1;
    plain.lora_E = at::Tensor();
  }
  return factors_of("subspace_similarity", argument, plain);
}

}  // namespace

DeltaSpectrum delta_spectrum(const AdapterUpdate& update) {
  return on_one_thread([&] { return spectrum_of(factors_of("delta_spectrum", "update", update)); });
}

at::Tensor subspace_similarity(const AdapterUpdate& first, const AdapterUpdate& second,
                               Subspace of) {
  return on_one_thread([&] {
    const at::Tensor one = directions(compared("first", first, of), of);
    const at::Tensor two = directions(compared("second", second, of), of);
    if (one.size(0) != two.size(0))
      fail("subspace_similarity", "second must have " + std::to_string(one.size(0)) +
                                      " features like first, got " + std::to_string(two.size(0)));
    const at::Tensor overlaps = one.t().matmul(two).square().cumsum(0).cumsum(1);
    const at::Tensor i = at::arange(1, one.size(1) + 1, one.options()).unsqueeze(1);
    const at::Tensor j = at::arange(1, two.size(1) + 1, one.options());
    return (overlaps / at::minimum(i, j)).clamp_max(1);
  });
}

EffectiveRanks effective_ranks(const at::Tensor& singular_values) {
  return on_one_thread([&] {
    const std::string function = "effective_ranks", argument = "singular_values";
    const at::Tensor s = std::get<0>(checked(function, argument, singular_values, {-1})
                                         .to(at::kCPU, at::kDouble)
                                         .sort(0, /*descending=*/true));
    check_finite(function, argument, s);
    EffectiveRanks ranks;
    if (s.numel() == 0) return ranks;
    if (s[-1].item<double>() < 0)
      fail(function,
           argument + " must not be negative, got " + std::to_string(s[-1].item<double>()));
    const double largest = s[0].item<double>();
    if (largest == 0) return ranks;
    const at::Tensor scaled = s / largest, p = scaled / scaled.sum();
    ranks.entropy = std::exp(-at::xlogy(p, p).sum().item<double>());
    const at::Tensor energy = scaled.square().cumsum(0);
    ranks.stable = energy[-1].item<double>();
    const auto fewest = [&](double part) {  // a part that is met but for rounding is met
      return (energy < part * ranks.stable * (1 - 1e-14)).sum().item<int64_t>() + 1;
    };
    ranks.energy_90 = fewest(0.90);
    ranks.energy_95 = fewest(0.95);
    ranks.energy_99 = fewest(0.99);
    return ranks;
  });
}

}  // namespace rankwise::analysis
