// SpectralAllocator at an event: directions are found and scored, a rule says how many each adapter
// gets, and factors, gradients and the optimizer's state follow.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <rankwise/spectral_allocator.h>
#include <rankwise/tensor_memory.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "spectral_directions.h"

namespace rankwise {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

at::Tensor doubles(const at::Tensor& tensor) {
  return tensor.detach().to(at::kCPU, at::kDouble).contiguous();
}

// Calls job(0 .. count - 1), always within a parallel region where there are threads: linear
// algebra takes one thread in it, so that results do not depend on how many there are.
template <class Job>
void for_each(size_t count, const Job& job) {
  const auto items = std::max<int64_t>(static_cast<int64_t>(count), 2);
  at::parallel_for(0, items, 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad;
    for (int64_t i = first; i < std::min<int64_t>(last, static_cast<int64_t>(count)); ++i)
      job(static_cast<size_t>(i));
  });
}

std::optional<Moments> moments_of(const at::Tensor& factor, const OptimizerView& optimizer) {
  if (optimizer.moments_of) return optimizer.moments_of(factor);
  if (!optimizer.state_of) return Moments();
  const auto state = optimizer.state_of(factor);
  return state && state->empty() ? std::optional(Moments()) : std::nullopt;
}

// A tensor along a factor's elements, in a new basis: its leading columns times `map`, or its
// leading rows from the left by the map's transpose.
struct Move {
  at::Tensor tensor;
  int64_t dim;
  at::Tensor map;
  at::Tensor values = {};

  void fetch() { values = doubles(tensor.narrow(dim, 0, map.size(0))); }
  void compute() { values = dim == 1 ? values.matmul(map) : map.t().matmul(values); }
  void write() const {
    tensor.narrow(dim, 0, map.size(1)).copy_(values);
    tensor.narrow(dim, map.size(1), map.size(0) - map.size(1)).zero_();
  }
};

uint64_t mixed(uint64_t seed, uint64_t step, uint64_t adapter) {
  uint64_t x = seed;
  for (const uint64_t part : {step, adapter}) {  // splitmix64
    x += 0x9e3779b97f4a7c15 * (part + 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    x ^= x >> 31;
  }
  return x;
}

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
  }
  for_each(found.size(), [&](size_t m) {
    Found& own = found[m];
    if (adapters_[m].rank == 0) return;
    own.spectrum = spectrum_of(own.A, own.B);
    own.direction_of = continued(own.spectrum, own.A, own.B);
    const at::Tensor norms = own.A.norm(2, 1);
    const double usual = row_length(own.A);
    own.lengths.resize(own.direction_of.size());
    for (size_t column = 0; column < own.direction_of.size(); ++column) {
      const double length = norms.const_data_ptr<double>()[column];
      own.lengths[own.direction_of[column]] = length > 0 ? length : usual;
    }
    if (!own.gA.defined()) return;
    const at::Tensor gradient =
        singular_gradients(own.spectrum, own.gA, own.gB).abs() / std::abs(adapters_[m].scaling);
    const auto* const first = gradient.const_data_ptr<double>();
    own.gradients.assign(first, first + gradient.numel());
  });
  return found;
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

// That the state of all whose rank falls can follow.
void SpectralAllocator::check_optimizer(const std::vector<int64_t>& ranks,
                                        const OptimizerView& optimizer) const {
  for (size_t m = 0; m < ranks.size(); ++m) {
    const Adapter& adapter = adapters_[m];
    if (ranks[m] >= adapter.rank) continue;
    for (const at::Tensor& factor : {adapter.lora_A, adapter.lora_B}) {
      const auto moments = moments_of(factor, optimizer);
      TORCH_CHECK(moments, "SpectralAllocator: the optimizer's state of '", adapter.name,
                  "' cannot follow its directions: it must be averages of gradients and of their "
                  "squares, as of SGD, Adam, AdamW, RMSprop or Adagrad");
      for (const auto* kind : {&moments->first, &moments->second})
        for (const at::Tensor& state : *kind)
          TORCH_CHECK(state.sizes() == factor.sizes(),
                      "SpectralAllocator: optimizer state must be ", factor.sizes(),
                      " like the parameter, got ", state.sizes());
    }
  }
}

void SpectralAllocator::event(const Gradients& gradients, const OptimizerView& optimizer) {
  const int64_t budget = budget_at(steps_ + 1);
  check_budget(budget, steps_ + 1);
  std::vector<Found> found = find(gradients);
  smooth(found);
  score(found);
  const std::vector<int64_t> ranks = ask(found, budget);
  check_optimizer(ranks, optimizer);

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
      const double size =
          adapters_[m].scaling * own.spectrum.S.const_data_ptr<double>()[own.order[place]];
      change += size * size;
      ++event.dropped;
    }
    event.added += std::max<int64_t>(ranks[m] - adapters_[m].rank, 0);
  }
  event.change = std::sqrt(change);
  for (size_t m = 0; m < found.size(); ++m) {
    for (size_t column = 0; column < columns_[m].size(); ++column)
      columns_[m][column] = found[m].columns[found[m].direction_of[column]];
    if (ranks[m] < adapters_[m].rank) this->change(m, found[m], ranks[m], optimizer);
  }
  for (size_t m = 0; m < found.size(); ++m)
    if (ranks[m] > adapters_[m].rank) add(m, ranks[m] - adapters_[m].rank);
  budget_ = budget;
  event.bank = bank();
  event.ranks = ranks_of_adapters();
  history_.push_back(std::move(event));
}

// Keeps the best `rank` directions of an adapter.
void SpectralAllocator::change(size_t m, const Found& found, int64_t rank,
                               const OptimizerView& optimizer) {
  Adapter& adapter = adapters_[m];
  std::vector<int64_t> kept(found.order.begin(), found.order.begin() + rank);
  std::ranges::sort(kept);
  const Repacked made = repacked(found.spectrum, kept, found.lengths);
  std::vector<Move> moves;
  const auto follow = [&](const at::Tensor& factor, int64_t dim, const at::Tensor& map) {
    if (factor.grad().defined()) {
      if (has_overlap(factor.grad())) factor.mutable_grad() = factor.grad().clone();
      moves.push_back({factor.grad(), dim, map});
    }
    const Moments moments = moments_of(factor, optimizer).value();
    for (const at::Tensor& first : moments.first) moves.push_back({first, dim, map});
    for (const at::Tensor& second : moments.second) moves.push_back({second, dim, map.square()});
  };
  follow(adapter.lora_A, 0, made.T_B);
  follow(adapter.lora_B, 1, made.T_A);
  for (Move& move : moves) move.fetch();
  for_each(moves.size(), [&](size_t i) { moves[i].compute(); });
  for (const Move& move : moves) move.write();
  Move{adapter.lora_A, 0, made.T_B, made.A}.write();
  Move{adapter.lora_B, 1, made.T_A, made.B}.write();
  std::vector<Column> columns;
  for (const int64_t i : kept) columns.push_back(found.columns[i]);
  columns_[m] = std::move(columns);
  std::erase_if(young_, [&](const Young& young) { return young.adapter == m; });
  adapter.change_rank(rank);
}

// Gives an adapter new directions: nothing of its output changes.
void SpectralAllocator::add(size_t m, int64_t count) {
  Adapter& adapter = adapters_[m];
  const int64_t rank = adapter.rank;
  const at::Tensor A = doubles(adapter.lora_A.narrow(0, 0, rank));
  at::Tensor rows;
  const uint64_t seed = mixed(static_cast<uint64_t>(options_.seed()), steps_ + 1, m);
  for_each(1, [&](size_t) { rows = fresh_rows(A, count, seed) * row_length(A); });
  adapter.lora_A.narrow(0, rank, count).copy_(rows);
  adapter.lora_B.narrow(1, rank, count).zero_();
  for (int64_t column = rank; column < rank + count; ++column) {
    columns_[m].push_back({.birth = steps_ + 1});
    if (options_.ramp_steps() == 0) continue;
    young_.push_back({m, column, adapter.lora_A.select(0, column).clone(),
                      adapter.lora_B.select(1, column).clone()});
  }
  adapter.change_rank(rank + count);
}

}  // namespace rankwise
