// What speaks for ranks: trained adapters, an allocator, gradients or inputs of a few batches.
#include <ATen/ATen.h>
#include <rankwise/rank_advice.h>
#include <rankwise/rank_allocator.h>
#include <rankwise/spectral_allocator.h>

#include <algorithm>
#include <cmath>

#include "adapter_modules.h"
#include "factors.h"

namespace rankwise::analysis {
namespace {

constexpr double deviations = 3;   // above the mean of random directions
constexpr double rounding = 1e-9;  // which must not decide where r = n, and nothing deviates

// How many of the first's directions lie within all of the second's beyond chance.
int64_t beyond_chance(const at::Tensor& phi, int64_t size) {
  const int64_t count = phi.size(0), rank = phi.size(1);
  if (count == 0 || rank == 0) return 0;
  const at::Tensor ranks = at::arange(1, count + 1, phi.options()).clamp_max(rank);
  const at::Tensor overlaps = phi.select(1, rank - 1) * ranks;
  const at::Tensor parts = overlaps.diff(1, 0, overlaps.new_zeros({1}));
  const auto r = static_cast<double>(rank), n = static_cast<double>(size);
  const double mean = r / n, deviation = std::sqrt(2 * r * (n - r) / (n + 2)) / n;
  return (parts > mean + deviations * deviation + rounding).sum().item<int64_t>();
}

MatrixEvidence of_update(const AdapterUpdate& update, std::vector<double> scores) {
  return {update.module, update.lora_B.size(0), update.lora_A.size(1), std::move(scores)};
}

std::vector<double> numbers_in(const at::Tensor& tensor) {
  const at::Tensor plain = tensor.to(at::kCPU, at::kDouble).contiguous();
  const auto* const first = plain.const_data_ptr<double>();
  return {first, first + plain.numel()};
}

// The ranks of each event, the last one last.
template <class Events>
std::vector<std::vector<int64_t>> ranks_in(const Events& history) {
  std::vector<std::vector<int64_t>> ranks;
  for (const auto& event : history) ranks.push_back(event.ranks);
  return ranks;
}

std::vector<std::vector<int64_t>> history_of(const Allocator& allocator) {
  if (const auto* pruning = dynamic_cast<const RankAllocator*>(&allocator))
    return ranks_in(pruning->history());
  if (const auto* spectral = dynamic_cast<const SpectralAllocator*>(&allocator))
    return ranks_in(spectral->history());
  fail("allocated_ranks",
       "allocator must be a RankAllocator or a SpectralAllocator, got another one");
}

double mean_square(const std::string& module, const at::Tensor& gradient) {
  const std::string argument = "the gradient of '" + module + "'";
  const at::Tensor plain = checked("squared_gradients", argument, gradient, {-1, -1});
  const at::ScalarType wide = c10::promoteTypes(plain.scalar_type(), at::kFloat);
  const double norm = plain.to(wide).norm().item<double>();
  if (!std::isfinite(norm))
    fail("squared_gradients", argument + " must be finite, got infinite or NaN values");
  return norm * norm / static_cast<double>(plain.numel());
}

// The largest shares of the variance.
std::vector<double> shares_of(const MatrixInputs& matrix, int64_t most) {
  const std::string argument = "inputs of '" + matrix.module + "'";
  const at::Tensor rows =
      checked("input_variances", argument, matrix.inputs, {-1, -1}).to(at::kCPU, at::kDouble);
  check_finite("input_variances", argument, rows);
  const int64_t count = std::min({most, matrix.out, rows.size(1)});
  if (rows.size(0) < std::max<int64_t>(count, 1))
    fail("input_variances", argument +
                                " must have at least as many rows as there are directions, " +
                                std::to_string(count) + ", got " + std::to_string(rows.size(0)));
  const at::Tensor centred = rows - rows.mean(0);
  const at::Tensor values =
      std::get<0>(at::linalg_eigh(centred.t().matmul(centred))).flip(0).clamp_min(0);
  const double total = values.sum().item<double>();
  return numbers_in((total > 0 ? values / total : values).narrow(0, 0, count));
}

}  // namespace

Agreement agreement(const AdapterUpdate& first, const AdapterUpdate& second, Subspace of) {
  const at::Tensor phi = subspace_similarity(first, second, of);
  const bool input = of == Subspace::input || of == Subspace::lora_A;
  const int64_t size = input ? first.lora_A.size(1) : first.lora_B.size(0);
  return on_one_thread([&] {
    const auto r1 = static_cast<double>(phi.size(0)), r2 = static_cast<double>(phi.size(1));
    const auto both = beyond_chance(phi, size) + beyond_chance(phi.t(), size);
    return Agreement{static_cast<double>(both) / 2,
                     phi.numel() > 0 ? phi[-1][-1].item<double>() * std::min(r1, r2) : 0,
                     r1 * r2 / static_cast<double>(size)};
  });
}

RankEvidence seed_agreement(const AdapterFile& first, const AdapterFile& second, Subspace of) {
  const std::vector<Modules> modules = {modules_of(first), modules_of(second)};
  for (const std::string& name : names_in(modules))
    if (!modules[0].contains(name) || !modules[1].contains(name))
      fail("seed_agreement", "both must adapt the same modules, got '" + name + "' in one alone");
  RankEvidence evidence;
  for (const auto& [name, update] : modules[0])
    evidence.matrices.push_back(
        of_update(update, {agreement(update, modules[1].at(name), of).directions}));
  return evidence;
}

RankEvidence update_energies(const AdapterFile& adapter) {
  RankEvidence evidence{.matrices = {}, .of_directions = true};
  for (const AdapterUpdate& update : updates_of(adapter))
    evidence.matrices.push_back(of_update(update, numbers_in(delta_spectrum(update).S.square())));
  return evidence;
}

RankEvidence allocated_ranks(const Allocator& allocator, int64_t events) {
  if (events < 1)
    fail("allocated_ranks", "events must be an integer >= 1, got " + std::to_string(events));
  const auto now = allocator.ranks();
  std::vector<std::vector<int64_t>> last = history_of(allocator);
  const auto count = static_cast<int64_t>(last.size());
  last.erase(last.begin(), last.end() - std::min(events, count));
  if (last.empty()) {
    last.emplace_back();
    for (const auto& [name, rank] : now) last[0].push_back(rank);
  }
  RankEvidence evidence;
  const auto sizes = allocator.sizes();
  for (size_t m = 0; m < now.size(); ++m) {
    int64_t sum = 0;
    for (const std::vector<int64_t>& ranks : last) sum += ranks[m];
    const double mean = static_cast<double>(sum) / static_cast<double>(last.size());
    evidence.matrices.push_back({now[m].first, sizes[m].first, sizes[m].second, {mean}});
  }
  return evidence;
}

RankEvidence squared_gradients(const std::vector<std::map<std::string, at::Tensor>>& batches) {
  if (batches.empty()) fail("squared_gradients", "there must be at least one batch, got none");
  RankEvidence evidence;
  for (const auto& [module, gradient] : batches[0]) {
    double sum = 0;
    for (const auto& batch : batches) {
      const auto found = batch.find(module);
      if (found == batch.end() || batch.size() != batches[0].size())
        fail("squared_gradients", "all batches must have the same modules, got '" + module +
                                      "' or another in some alone");
      if (!found->second.defined() || !gradient.defined() ||
          found->second.sizes() != gradient.sizes())
        fail("squared_gradients",
             "gradients of '" + module + "' must have one shape in all batches");
      sum += mean_square(module, found->second) / static_cast<double>(batches.size());
    }
    evidence.matrices.push_back({module, gradient.size(0), gradient.size(1), {sum}});
  }
  return evidence;
}

RankEvidence input_variances(const std::vector<MatrixInputs>& matrices, int64_t most) {
  if (most < 1) fail("input_variances", "most must be an integer > 0, got " + std::to_string(most));
  RankEvidence evidence{.matrices = {}, .of_directions = true};
  for (const MatrixInputs& matrix : matrices) {
    auto shares = on_one_thread([&] { return shares_of(matrix, most); });
    evidence.matrices.push_back(
        {matrix.module, matrix.out, matrix.inputs.size(1), std::move(shares)});
  }
  return evidence;
}

}  // namespace rankwise::analysis
