// SpectralAllocator at an event: directions are found and scored, and a rule says how many each
// adapter gets.
#include <ATen/ATen.h>
#include <rankwise/spectral_allocator.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "../ops/cpu/blocks.h"
#include "group_decision.h"
#include "spectral_directions.h"

namespace rankwise {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

}  // namespace

std::vector<SpectralAllocator::Found> SpectralAllocator::find(const Gradients& gradients) const {
  std::vector<Found> found(adapters_.size());
  for (size_t m = 0; m < found.size(); ++m) {
    const Adapter& adapter = adapters_[m];
    found[m].A = doubles(adapter.lora_A.narrow(0, 0, adapter.rank));
    found[m].B = doubles(adapter.lora_B.narrow(1, 0, adapter.rank));
    TORCH_CHECK(
        found[m].A.isfinite().all().item<bool>() && found[m].B.isfinite().all().item<bool>(),
        "SpectralAllocator: the factors of '", adapter.name, "' are infinite or NaN at step ",
        steps_ + 1, ", so that they have no singular directions");
    const std::optional<at::Tensor> gA = gradients[3 * m], gB = gradients[3 * m + 1];
    if (!gA || !gB) continue;
    found[m].gA = doubles(gA->narrow(0, 0, adapter.rank));
    found[m].gB = doubles(gB->narrow(1, 0, adapter.rank));
    found[m].unseen = doubles(gA->narrow(0, adapter.rank, adapter.probes));
  }
  run_blocks(static_cast<int64_t>(found.size()), [&](int64_t m) {
    if (adapters_[m].rank > 0) found[m].look(adapters_[m].scaling);
    if (adapters_[m].probes > 0 && found[m].unseen.defined())
      found[m].sketch = sketch_of(found[m].unseen, found[m].spectrum.V, adapters_[m].scaling);
  });
  return found;
}

void SpectralAllocator::Found::look(double scaling) {
  spectrum = spectrum_of(A, B);
  direction_of = continued(spectrum, A, B);
  const at::Tensor norms = A.norm(2, 1);
  const double usual = row_length(A);
  lengths.resize(direction_of.size());
  for (size_t column = 0; column < direction_of.size(); ++column) {
    const double length = norms.const_data_ptr<double>()[column];
    lengths[direction_of[column]] = length > 0 ? length : usual;
  }
  if (!gA.defined()) return;
  const at::Tensor of_singular_values =
      singular_gradients(spectrum, gA, gB).abs() / std::abs(scaling);
  const auto* const first = of_singular_values.const_data_ptr<double>();
  gradients.assign(first, first + of_singular_values.numel());
}

// The rule's ranks, which must be possible.
std::vector<int64_t> SpectralAllocator::ask(const std::vector<Found>& found, int64_t budget) const {
  RankQuestion question{.step = steps_ + 1, .budget = budget, .costs = costs_};
  for (size_t m = 0; m < found.size(); ++m) {
    std::vector<double> scores;
    for (const int64_t i : found[m].order) scores.push_back(found[m].scores[i]);
    question.scores.push_back(std::move(scores));
    question.young.push_back(found[m].young);
    question.lowest.push_back(lowest(m));
    question.highest.push_back(highest(m));
    question.unserved.push_back(found[m].sketch.energy);
    question.former.emplace_back(former_[m].begin() + adapters_[m].rank, former_[m].end());
  }
  const std::vector<int64_t> ranks = rule_(question);
  const auto fail = [&](const std::string& wanted, const std::string& got) {
    throw std::invalid_argument("SpectralAllocator: the rule's ranks of step " +
                                std::to_string(steps_ + 1) + " must " + wanted + ", got " + got);
  };
  if (ranks.size() != found.size())
    fail("be " + std::to_string(found.size()), std::to_string(ranks.size()));
  for (size_t m = 0; m < ranks.size(); ++m) {
    if (ranks[m] < question.lowest[m] || ranks[m] > question.highest[m])
      fail("be from " + std::to_string(question.lowest[m]) + " to " +
               std::to_string(question.highest[m]) + " for '" + adapters_[m].name + "'",
           std::to_string(ranks[m]));
  }
  if (question.cost(ranks) > budget)
    fail("cost at most the budget " + std::to_string(budget), std::to_string(question.cost(ranks)));
  return ranks;
}

// The group's: bits of what an adapter is scored by before scores are made comparable with others,
// and new ranks.
void SpectralAllocator::meet(const std::vector<Found>& found, const std::vector<int64_t>& ranks,
                             int64_t budget) {
  Decision mine{.steps = steps_ + 1, .skipped_steps = skipped_steps_, .budget = budget};
  for (size_t m = 0; m < found.size(); ++m) {
    std::vector<double> sensitivities = {found[m].sketch.energy};
    for (const Column& column : found[m].columns) sensitivities.push_back(column.sensitivity);
    Digest scored;
    scored.add(at::tensor(sensitivities, at::kDouble));
    if (found[m].spectrum.S.defined()) scored.add(found[m].spectrum.S);
    mine.scores.push_back(scored.value());
    mine.choices.push_back(
        Digest().add(ranks[m]).add(at::tensor(found[m].order, at::kLong)).value());
  }
  agree(mine);
}

void SpectralAllocator::event(const Gradients& gradients, const OptimizerView& optimizer) {
  const int64_t budget = budget_at(steps_ + 1);
  check_budget(budget, steps_ + 1);
  std::vector<Found> found = find(gradients);
  smooth(found);
  score(found);
  const std::vector<int64_t> ranks = ask(found, budget);
  check_optimizer(ranks, optimizer);
  if (meets()) meet(found, ranks, budget);

  SpectralEvent event{
      .step = steps_ + 1, .budget = budget, .lowest_kept = nan, .highest_dropped = nan};
  double change = 0;
  for (size_t m = 0; m < found.size(); ++m) {
    const Found& own = found[m];
    const auto kept = std::min<int64_t>(ranks[m], adapters_[m].rank);
    for (size_t place = 0; place < own.order.size(); ++place) {
      const double score = own.scores[own.order[place]];
      if (static_cast<int64_t>(place) < kept) {
        event.lowest_kept = std::fmin(event.lowest_kept, score);
        continue;
      }
      event.highest_dropped = std::fmax(event.highest_dropped, score);
      former_[m][place] = score;
      const double size =
          adapters_[m].scaling * own.spectrum.S.const_data_ptr<double>()[own.order[place]];
      change += size * size;
      ++event.dropped;
    }
    event.added += std::max<int64_t>(ranks[m] - adapters_[m].rank, 0);
  }
  event.change = std::sqrt(change);
  remove_probes(optimizer);
  for (size_t m = 0; m < found.size(); ++m) {
    for (size_t column = 0; column < columns_[m].size(); ++column)
      columns_[m][column] = found[m].columns[found[m].direction_of[column]];
    if (ranks[m] < adapters_[m].rank) this->change(m, found[m], ranks[m], optimizer);
  }
  for (size_t m = 0; m < found.size(); ++m)
    if (ranks[m] > adapters_[m].rank) add(m, found[m], ranks[m] - adapters_[m].rank);
  budget_ = budget;
  event.bank = bank();
  event.ranks = ranks_of_adapters();
  history_.push_back(std::move(event));
}

}  // namespace rankwise
