// RankRule: how many directions each adapter gets, from their scores. No tensors here.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace rankwise {

/// What an allocator asks at an event. Ranks may be from `lowest` to `highest`, and the sum of rank
/// times cost at most `budget`; what a rule leaves of it stays in the bank.
struct RankQuestion {
  int64_t step = 0;
  int64_t budget = 0;  ///< in parameters
  /// Of each adapter's directions: first those that are too young to be compared, then the others
  /// by falling score. A lower rank drops the last ones, a higher one adds new directions.
  std::vector<std::vector<double>> scores = {};
  std::vector<int64_t> young = {};                 ///< how many of them are too young
  std::vector<int64_t> costs = {};                 ///< of one direction: in + out
  std::vector<int64_t> lowest = {}, highest = {};  ///< ranks that an adapter may have
  /// |dL/dW|^2 of the part that the adapter's rows of A do not see, as probes estimate it
  /// (Frobenius norm); 0 without probes, which adapters of the highest rank do not have.
  std::vector<double> unserved = {};

  /// What each adapter's further directions scored when it last had them, from its (rank + 1)-th
  /// on; NaN, or nothing at the end, where it never did.
  std::vector<std::vector<double>> former = {};

  std::vector<int64_t> ranks() const;  ///< the present ones
  int64_t cost(const std::vector<int64_t>& ranks) const;
};

/// New ranks, in the order of the adapters. It must depend on the question alone.
using RankRule = std::function<std::vector<int64_t>(const RankQuestion&)>;

/// Which adapters gain first.
enum class GrowthOrder {
  least,     ///< those of the best kth_least score from below
  mean,      ///< of the best mean score
  gradient,  ///< of the largest unserved gradient
};

/// What exchange_rule does beyond the budget.
struct ExchangeSettings {
  double threshold = 0;     ///< directions with lower scores are dropped
  double hysteresis = 0.5;  ///< in [0, 1): a direction gives way where its score is that part less
  /// Directions dropped by choice, and added, at most; negative: as many as there are adapters.
  int64_t max_moves = -1;
  GrowthOrder growth = GrowthOrder::least;
  int64_t kth_least = 1;  ///< >= 1; the best score of adapters that have fewer
};

/// Drops the directions of the lowest scores until the budget is kept, then those below the
/// threshold, and gives parameters to adapters that may have more, in turns of one rank each, in
/// the order of `growth`: from what is free, or by dropping directions of others whose scores are
/// below (1 - hysteresis) of what the new one is expected to score: what the gaining adapter's
/// weakest one does, or that further one when it was last there, if that is less. So no direction
/// gives way to one that is worse, ranks do not go to and fro, and by the order `least` the weakest
/// scores draw level. Equals are decided by the order of adapters. An adapter gains nothing while
/// it has young directions, nor at an event at which it loses some, nor the other way round.
RankRule exchange_rule(const ExchangeSettings& settings);

}  // namespace rankwise
