// RankAllocator: what it is made of and what it tells.
#include <ATen/ATen.h>
#include <rankwise/rank_allocator.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "../ops/importance.h"
#include "averages.h"

namespace rankwise {
namespace {

[[noreturn]] void fail(const std::string& message) {
  throw std::invalid_argument("RankAllocator: " + message);
}

std::vector<int64_t> costs_of(const std::vector<Adapter>& adapters, BudgetUnit unit) {
  std::vector<int64_t> costs;
  for (const Adapter& adapter : adapters) {
    const int64_t parameters = adapter.lora_A.size(1) + adapter.lora_B.size(0);
    costs.push_back(unit == BudgetUnit::triplets ? 1 : parameters);
  }
  return costs;
}

// What the adapters cost with at most `rank` directions each.
int64_t cost_at(const std::vector<int64_t>& ranks, const std::vector<int64_t>& costs,
                int64_t rank) {
  int64_t sum = 0;
  for (size_t m = 0; m < ranks.size(); ++m) sum += std::min(ranks[m], rank) * costs[m];
  return sum;
}

BudgetSchedule make_schedule(const std::vector<int64_t>& ranks, const std::vector<int64_t>& costs,
                             const AdaLoRAOptions& options) {
  const int64_t all = std::numeric_limits<int64_t>::max();
  return {cost_at(ranks, costs, all), cost_at(ranks, costs, options.target_rank()), options};
}

}  // namespace

RankAllocator::RankAllocator(std::vector<Adapter> adapters, const AdaLoRAOptions& options)
    : Allocator("RankAllocator", "rank_allocator", std::move(adapters), /*triplets=*/true),
      initial_ranks_(ranks_of_adapters()),
      costs_(costs_of(adapters_, options.budget_unit())),
      options_(options),
      schedule_(make_schedule(initial_ranks_, costs_, options)) {
  const int64_t directions = std::accumulate(initial_ranks_.begin(), initial_ranks_.end(), 0LL);
  const bool pruned = std::ranges::any_of(
      adapters_, [](const Adapter& a) { return a.directions && a.directions->first_rank() > 0; });
  if (directions == 0 && !pruned) fail("the adapters have rank 0: there is nothing to allocate");
  kept_ = at::ones({directions}, at::kBool);
  choices_ = at::empty({0, static_cast<int64_t>(adapters_.size()) + 2}, at::kLong);
  summaries_ = at::empty({0, 4}, at::kDouble);
  budgets_ = at::empty({0}, at::kLong);
  set_progress(tensor_of({.budget = -1}));
  place();
  allocate_averages();
  take_charge(options_.shrink());
}

BudgetSchedule RankAllocator::schedule_from(const std::vector<int64_t>& ranks) const {
  return make_schedule(ranks, costs_, options_);
}

void RankAllocator::allocate_averages() {
  Averages averages = zero_averages(factors_);
  sensitivity_ = std::move(averages.sensitivity);
  uncertainty_ = std::move(averages.uncertainty);
}

std::vector<std::pair<std::string, int64_t>> RankAllocator::ranks() const {
  std::vector<std::pair<std::string, int64_t>> result;
  const at::Tensor kept = kept_.cpu();
  const bool* keep = kept.const_data_ptr<bool>();
  for (size_t m = 0; m < adapters_.size(); keep += initial_ranks_[m], ++m)
    result.emplace_back(adapters_[m].name, std::count(keep, keep + initial_ranks_[m], true));
  return result;
}

std::vector<std::pair<std::string, at::Tensor>> RankAllocator::pattern() const {
  std::vector<std::pair<std::string, at::Tensor>> result;
  const std::vector<at::Tensor> kept = kept_.cpu().split_with_sizes(initial_ranks_);
  for (size_t m = 0; m < adapters_.size(); ++m)
    result.emplace_back(adapters_[m].name, kept[m].clone());
  return result;
}

at::Tensor RankAllocator::orthogonality_penalty(OrthogonalityForm form) const {
  std::vector<at::Tensor> lora_A, lora_B;
  for (size_t m = 0; m < adapters_.size(); ++m) check_order(m);
  for (const Adapter& adapter : adapters_) {
    lora_A.push_back(adapter.lora_A);
    lora_B.push_back(adapter.lora_B);
  }
  return rankwise::orthogonality_penalty(lora_A, lora_B, form, ranks_of_adapters());
}

}  // namespace rankwise
