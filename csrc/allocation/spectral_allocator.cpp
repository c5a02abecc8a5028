// SpectralAllocator: what it is made of, and what it does in each step.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <rankwise/spectral_allocator.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "../ops/importance.h"
#include "spectral_directions.h"

namespace rankwise {
namespace {

template <class... Parts>
void require(bool condition, const Parts&... message) {
  if (condition) return;
  std::ostringstream text;
  text << "SpectralAllocator: ";
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

void require_count(const char* name, int64_t value, int64_t least) {
  require(value >= least, name, " must be at least ", least, ", got ", value);
}

int64_t smaller_side(const Adapter& adapter) {
  return std::min(adapter.lora_A.size(1), adapter.lora_B.size(0));
}

// Of one direction.
int64_t cost_of(const Adapter& adapter) {
  return adapter.lora_A.size(1) + adapter.lora_B.size(0);
}

// The one that the adapter was made with, also where an earlier allocator moved it.
int64_t first_rank_of(const Adapter& adapter) {
  return adapter.directions ? adapter.directions->first_rank() : adapter.rank;
}

// The options with what they leave open.
SpectralOptions completed(SpectralOptions options, const std::vector<Adapter>& adapters) {
  options.check();
  if (options.min_age() < 0) options.min_age(2 * options.allocation_interval());
  int64_t cost = 0;
  for (const Adapter& adapter : adapters) {
    const int64_t side = smaller_side(adapter);
    require(adapter.rank <= side, "the rank of '", adapter.name, "' must be at most ", side,
            ", the smaller side of its layer, got ", adapter.rank);
    cost += first_rank_of(adapter) * cost_of(adapter);
  }
  if (options.initial_budget() == 0) {
    require(options.final_budget() <= cost,
            "final_budget must be at most what the first ranks cost, ", cost, ", got ",
            options.final_budget());
    options.initial_budget(cost);
  }
  require(options.initial_budget() >= cost,
          "initial_budget must be at least what the first ranks cost, ", cost, ", got ",
          options.initial_budget());
  if (options.final_budget() == 0) options.final_budget(options.initial_budget());
  return options;
}

BudgetSchedule schedule_of(const SpectralOptions& options) {
  AllocationSettings settings;
  settings.target_rank = 0;
  settings.total_steps = options.total_steps();
  settings.warmup_steps = options.warmup_steps();
  settings.final_steps = options.final_steps();
  settings.allocation_interval = options.allocation_interval();
  return {options.initial_budget(), options.final_budget(), {1, settings}};
}

}  // namespace

void SpectralOptions::check() const {
  require_count("total_steps (the optimizer steps of the whole training)", total_steps_, 1);
  require_count("warmup_steps", warmup_steps_, 0);
  require_count("final_steps", final_steps_, 0);
  require(warmup_steps_ < total_steps_ && final_steps_ < total_steps_ - warmup_steps_,
          "warmup_steps + final_steps must be less than total_steps ", total_steps_,
          ", for ranks move between them, got ", warmup_steps_, " + ", final_steps_);
  require_count("allocation_interval", allocation_interval_, 1);
  require_count("min_rank", min_rank_, 0);
  require(max_rank_ == 0 || max_rank_ >= min_rank_, "max_rank must be at least min_rank ",
          min_rank_, ", or 0 for the capacity, got ", max_rank_);
  require_count("initial_budget", initial_budget_, 0);
  require_count("final_budget", final_budget_, 0);
  require(initial_budget_ == 0 || final_budget_ <= initial_budget_,
          "final_budget must be at most initial_budget ", initial_budget_, ", got ", final_budget_);
  require(sensitivity_weight_ >= 0, "sensitivity_weight must be at least 0, got ",
          sensitivity_weight_);
  require(beta_ >= 0 && beta_ < 1, "beta must be in [0, 1), got ", beta_);
  require(exchange_.hysteresis >= 0 && exchange_.hysteresis < 1,
          "hysteresis must be in [0, 1), got ", exchange_.hysteresis);
  require(exchange_.threshold >= 0, "threshold must be at least 0, got ", exchange_.threshold);
  require_count("kth_least", exchange_.kth_least, 1);
  require_count("probes", probes_, 0);
  require(exchange_.growth != GrowthOrder::gradient || probes_ > 0 || rule_,
          "probes must be at least 1 for growth by the gradient, got 0");
  require_count("ramp_steps", ramp_steps_, 0);
  require_count("seed", seed_, 0);
}

SpectralAllocator::SpectralAllocator(std::vector<Adapter> adapters, const SpectralOptions& options)
    : Allocator("SpectralAllocator", "spectral_allocator", std::move(adapters), /*triplets=*/false),
      options_(completed(options, adapters_)),
      schedule_(schedule_of(options_)),
      rule_(options_.rule() ? options_.rule() : exchange_rule(options_.exchange())),
      budget_(options_.initial_budget()) {
  for (const Adapter& adapter : adapters_) {
    first_ranks_.push_back(first_rank_of(adapter));
    costs_.push_back(cost_of(adapter));
    columns_.emplace_back(adapter.rank);
    former_.emplace_back(adapter.lora_A.size(0), std::numeric_limits<double>::quiet_NaN());
  }
  check_budget(options_.final_budget(), options_.freeze_step());
  take_charge(/*moves=*/true);
}

int64_t SpectralAllocator::highest(size_t m) const {
  const int64_t room = std::min(smaller_side(adapters_[m]), adapters_[m].lora_A.size(0));
  const int64_t wanted = options_.max_rank() == 0 ? room : std::min(room, options_.max_rank());
  return std::max(wanted, first_ranks_[m]);
}

int64_t SpectralAllocator::lowest(size_t m) const {
  return std::min(options_.min_rank(), first_ranks_[m]);
}

// The budget of a step, which the lowest ranks must fit into.
void SpectralAllocator::check_budget(int64_t budget, int64_t step) const {
  int64_t least = 0;
  for (size_t m = 0; m < adapters_.size(); ++m) least += lowest(m) * costs_[m];
  require(budget >= least, "the budget of step ", step, " must be at least ", least,
          ", what min_rank ", options_.min_rank(), " needs, got ", budget);
}

int64_t SpectralAllocator::budget_at(int64_t step) const {
  return options_.budget_at() ? options_.budget_at()(step) : schedule_.budget(step);
}

int64_t SpectralAllocator::bank() const {
  int64_t left = budget_;
  for (size_t m = 0; m < adapters_.size(); ++m) left -= adapters_[m].rank * costs_[m];
  return left;
}

std::vector<std::pair<std::string, int64_t>> SpectralAllocator::ranks() const {
  std::vector<std::pair<std::string, int64_t>> result;
  for (const Adapter& adapter : adapters_) result.emplace_back(adapter.name, adapter.rank);
  return result;
}

void SpectralAllocator::take_step(const OptimizerView& optimizer) {
  const at::NoGradGuard no_grad;
  check_adapters();
  check_all_memory();
  if (frozen()) {
    warn_of_untrained(optimizer);
    if (meets()) agree({.steps = steps_ + 1, .skipped_steps = skipped_steps_});
    *stepped_ = true;
    ramp();
    end_ramps();
    ++steps_;
    return;
  }
  const Gradients gradients = gather(steps_ + 1);
  warn_of_untrained(optimizer);
  const bool left_out = optimizer.found_inf.defined() && optimizer.found_inf.item<double>() != 0;
  const bool finite = !importance_check(present(gradients))[0].item<bool>();
  if (left_out || !finite) {
    if (meets()) agree({.steps = steps_, .skipped_steps = skipped_steps_ + 1});
    *stepped_ = true;
    ++skipped_steps_;
    return;
  }
  unless_agreed(meets() ? ramped() : std::vector<at::Tensor>(), [&] {
    ramp();
    if (schedule_.allocates(steps_ + 1)) {
      event(gradients, optimizer);
    } else if (meets()) {
      agree({.steps = steps_ + 1, .skipped_steps = skipped_steps_});
    }
  });
  end_ramps();
  *stepped_ = true;
  ++steps_;
  insert_probes();
}

// How much of a new direction's updates counts in this step, by its age.
double SpectralAllocator::part_of(const Young& young) const {
  const int64_t age = steps_ + 1 - columns_[young.adapter][young.column].birth;
  return static_cast<double>(age) / static_cast<double>(options_.ramp_steps() + 1);
}

// Of the updates of new directions, the part that their age allows.
void SpectralAllocator::ramp() {
  for (const Young& young : young_) {
    const double part = part_of(young);
    if (part >= 1) continue;
    for (const auto& [now, before] :
         {std::pair(row_of(young), young.A), std::pair(column_of(young), young.B)}) {
      now.copy_(before.to(now.device()).lerp(now, part));
      before.copy_(now);
    }
  }
}

void SpectralAllocator::end_ramps() {
  std::erase_if(young_, [&](const Young& young) { return part_of(young) >= 1; });
}

at::Tensor SpectralAllocator::row_of(const Young& young) const {
  return adapters_[young.adapter].lora_A.select(0, young.column);
}

at::Tensor SpectralAllocator::column_of(const Young& young) const {
  return adapters_[young.adapter].lora_B.select(1, young.column);
}

// What ramp() writes.
std::vector<at::Tensor> SpectralAllocator::ramped() const {
  std::vector<at::Tensor> tensors;
  for (const Young& young : young_)
    tensors.insert(tensors.end(), {row_of(young), column_of(young), young.A, young.B});
  return tensors;
}

}  // namespace rankwise
