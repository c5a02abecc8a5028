// SpectralOptions: when a SpectralAllocator moves ranks, and by what. No tensors here.
#pragma once

#include <rankwise/rank_rule.h>
#include <torch/arg.h>

#include <cstdint>
#include <functional>

namespace rankwise {

/// How a direction's singular value s and the averaged h = |dL/ds| make a score.
enum class SpectralScore {
  normalised,  ///< s / mean(s) + weight h / mean(h), means over all directions: no unit
  literal,     ///< s + weight h
};

/// A spectral schedule, by chained setters. Steps are counted from 1; at an event ranks may change:
/// every allocation_interval steps between warm-up and freeze_step, and at freeze_step.
class SpectralOptions {
 public:
  TORCH_ARG(int64_t, total_steps) = 0;            ///< of the whole training, >= 1
  TORCH_ARG(int64_t, warmup_steps) = 0;           ///< steps at the start that move nothing
  TORCH_ARG(int64_t, final_steps) = 0;            ///< steps at the end that move nothing
  TORCH_ARG(int64_t, allocation_interval) = 100;  ///< steps between two events, >= 1

  TORCH_ARG(int64_t, min_rank) = 1;  ///< of every adapter, >= 0; less where its first rank is less
  /// Of every adapter; 0: its capacity. No rank is above min(in, out) either.
  TORCH_ARG(int64_t, max_rank) = 0;

  /// In parameters, in + out a direction, at the start and at the end, between which it falls as
  /// BudgetSchedule; 0: what the first ranks cost, and no fall.
  TORCH_ARG(int64_t, initial_budget) = 0;
  TORCH_ARG(int64_t, final_budget) = 0;  ///< at most the initial one
  /// Another budget: a function of the step alone, asked at events. Not part of a state.
  TORCH_ARG(std::function<int64_t(int64_t step)>, budget_at) = {};

  TORCH_ARG(SpectralScore, score) = SpectralScore::normalised;
  TORCH_ARG(double, sensitivity_weight) = 0.1;  ///< of h in a score, >= 0
  TORCH_ARG(double, beta) = 0.85;               ///< decay of h's average over events, [0, 1)

  TORCH_ARG(ExchangeSettings, exchange) = {};
  /// In the place of exchange_rule(exchange()). Not part of a state.
  TORCH_ARG(RankRule, rule) = {};

  /// Steps before a choice may drop a new direction; negative: two intervals.
  TORCH_ARG(int64_t, min_age) = -1;
  /// Steps over which a new direction's updates grow to their full size, >= 0.
  TORCH_ARG(int64_t, ramp_steps) = 0;
  /// Directions by which each adapter looks, in the step of an event, at the gradient that its own
  /// do not see, where it has room: new ones begin with the largest part of that. 0: they are
  /// random, and RankQuestion::unserved is not known.
  TORCH_ARG(int64_t, probes) = 0;
  TORCH_ARG(int64_t, seed) = 0;  ///< of new directions, and of probes

 public:
  /// The last event: total_steps - final_steps.
  int64_t freeze_step() const { return total_steps_ - final_steps_; }
  /// Throws std::invalid_argument naming the option, what was wanted and what came.
  void check() const;
};

}  // namespace rankwise
