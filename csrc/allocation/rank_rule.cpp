// exchange_rule: ranks that follow the scores within a budget of parameters.
#include <rankwise/rank_rule.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

namespace rankwise {
namespace {

// The ranks while a rule changes them.
class Exchange {
 public:
  Exchange(const RankQuestion& question, const ExchangeSettings& settings)
      : question_(question),
        settings_(settings),
        before_(question.ranks()),
        ranks_(before_),
        cost_(question.cost(before_)),
        left_(settings.max_moves < 0 ? static_cast<int64_t>(before_.size()) : settings.max_moves) {}

  std::vector<int64_t> result() && {
    keep_to_budget();
    drop_below_threshold();
    while (give_in_turn()) {
    }
    return std::move(ranks_);
  }

 private:
  // The adapter whose last direction has the lowest score, of those with more than `floor`.
  template <class Floor>
  std::optional<size_t> weakest(const Floor& floor, const std::vector<int64_t>& ranks) const {
    std::optional<size_t> found;
    for (size_t m = 0; m < ranks.size(); ++m) {
      if (ranks[m] <= floor(m)) continue;
      // The later of equals goes first.
      if (!found || last_score(m, ranks) <= last_score(*found, ranks)) found = m;
    }
    return found;
  }

  double last_score(size_t m, const std::vector<int64_t>& ranks) const {
    return question_.scores[m][ranks[m] - 1];
  }

  void keep_to_budget() {
    while (cost_ > question_.budget) {
      const auto m = weakest([&](size_t i) { return question_.lowest[i]; }, ranks_);
      if (!m) return;  // what the lowest ranks need is the allocator's to check
      drop(*m);
    }
  }

  // Directions that a choice may drop: of adapters that did not gain.
  int64_t floor(size_t m) const {
    if (ranks_[m] > before_[m]) return ranks_[m];
    return std::max(question_.lowest[m], question_.young[m]);
  }

  void drop_below_threshold() {
    while (left_ > 0) {
      const auto m = weakest([&](size_t i) { return floor(i); }, ranks_);
      if (!m || last_score(*m, ranks_) >= settings_.threshold) return;
      drop(*m);
      --left_;
    }
  }

  void drop(size_t m) {
    --ranks_[m];
    cost_ -= question_.costs[m];
  }

  // Of one direction more than now.
  double expected_score(size_t m) const {
    const double weakest = question_.scores[m].empty() ? 0 : question_.scores[m].back();
    const auto further = static_cast<size_t>(ranks_[m] - before_[m]);
    if (m >= question_.former.size() || further >= question_.former[m].size()) return weakest;
    return std::fmin(weakest, question_.former[m][further]);  // of NaN and a number the number
  }

  double priority(size_t m) const {
    const std::vector<double>& own = question_.scores[m];
    const auto count = static_cast<int64_t>(own.size());
    switch (settings_.growth) {
      case GrowthOrder::gradient:
        return question_.unserved.at(m);
      case GrowthOrder::mean:
        return count == 0 ? 0 : std::reduce(own.begin(), own.end()) / static_cast<double>(count);
      case GrowthOrder::least:
        break;
    }
    if (settings_.kth_least == 1) return expected_score(m);
    return count == 0 ? 0 : own[count - std::min(settings_.kth_least, count)];
  }

  // One more direction for each adapter that can have it, the best first; false where none can.
  bool give_in_turn() {
    std::vector<size_t> order;
    for (size_t m = 0; m < ranks_.size(); ++m)
      if (ranks_[m] < question_.highest[m] && ranks_[m] >= before_[m] && question_.young[m] == 0)
        order.push_back(m);
    std::ranges::stable_sort(order, std::ranges::greater(), [&](size_t m) { return priority(m); });
    int64_t given = 0;
    for (const size_t m : order) given += ranks_[m] >= before_[m] && left_ > 0 && pay_for(m);
    return given > 0;
  }

  bool pay_for(size_t m) {
    std::vector<int64_t> ranks = ranks_;
    int64_t cost = cost_ + question_.costs[m], moves = 1;
    while (cost > question_.budget) {
      const auto victim = weakest([&](size_t i) { return i == m ? ranks[i] : floor(i); }, ranks);
      const bool worth =
          victim && last_score(*victim, ranks) < (1 - settings_.hysteresis) * expected_score(m);
      if (!worth || ++moves > left_) return false;
      --ranks[*victim];
      cost -= question_.costs[*victim];
    }
    ranks_ = std::move(ranks);
    ++ranks_[m];
    cost_ = cost;
    left_ -= moves;
    return true;
  }

  const RankQuestion& question_;
  const ExchangeSettings& settings_;
  const std::vector<int64_t> before_;
  std::vector<int64_t> ranks_;
  int64_t cost_, left_;
};

}  // namespace

std::vector<int64_t> RankQuestion::ranks() const {
  std::vector<int64_t> result;
  for (const std::vector<double>& own : scores) result.push_back(static_cast<int64_t>(own.size()));
  return result;
}

int64_t RankQuestion::cost(const std::vector<int64_t>& ranks) const {
  return std::inner_product(ranks.begin(), ranks.end(), costs.begin(), int64_t{0});
}

RankRule exchange_rule(const ExchangeSettings& settings) {
  return [settings](const RankQuestion& question) { return Exchange(question, settings).result(); };
}

}  // namespace rankwise
