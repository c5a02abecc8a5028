// Integer ranks within a budget of parameters: in proportion to scores, or the best directions.
#include <rankwise/rank_advice.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "factors.h"

namespace rankwise::analysis {
namespace {

// Levels span the range of double times that of ranks, which long double has.
using Real = long double;

// How much of an exact rank rounding down takes, in float, so that the last bits of Real decide no
// tie; 0 where they might be all of it.
float taken(Real exact, int64_t rank) {
  const auto below = static_cast<Real>(rank);
  return exact - below > 1e-15L * below ? static_cast<float>(exact - below) : 0;
}

class Proportion {
 public:
  Proportion(const std::vector<double>& scores, const std::vector<RankRoom>& rooms)
      : scores_(scores), rooms_(rooms) {}

  Real exact(size_t i, Real level) const {
    const auto low = static_cast<Real>(rooms_[i].lowest);
    const auto high = static_cast<Real>(rooms_[i].highest);
    return std::clamp(level * static_cast<Real>(scores_[i]), low, high);
  }

  Real cost(Real level) const {
    Real sum = 0;
    for (size_t i = 0; i < rooms_.size(); ++i)
      sum += exact(i, level) * static_cast<Real>(rooms_[i].cost);
    return sum;
  }

  // Where the exact ranks cost the budget, or the last level at which one of them grows. Between
  // those at which a rank leaves or reaches its room the cost is linear.
  Real level(Real budget) const {
    std::vector<Real> levels = {0};
    for (size_t i = 0; i < rooms_.size(); ++i)
      for (const int64_t bound : {rooms_[i].lowest, rooms_[i].highest})
        if (scores_[i] > 0)
          levels.push_back(static_cast<Real>(bound) / static_cast<Real>(scores_[i]));
    std::ranges::sort(levels);
    const auto above =
        std::ranges::partition_point(levels, [&](Real level) { return cost(level) <= budget; });
    if (above == levels.end()) return levels.back();
    if (above == levels.begin()) return 0;
    const Real below = *std::prev(above), spent = cost(below);
    return below + (budget - spent) / (cost(*above) - spent) * (*above - below);
  }

 private:
  const std::vector<double>& scores_;
  const std::vector<RankRoom>& rooms_;
};

// What the lowest ranks leave of the budget.
int64_t rest_of(const std::string& function, size_t scores, const std::vector<RankRoom>& rooms,
                int64_t budget) {
  if (scores != rooms.size())
    fail(function, "rooms must be " + std::to_string(scores) + " like the scores, got " +
                       std::to_string(rooms.size()));
  int64_t least = 0;
  for (const RankRoom& room : rooms) least += room.cost * room.lowest;
  if (budget < least)
    fail(function, "budget must be at least " + std::to_string(least) +
                       ", which the lowest ranks cost, got " + std::to_string(budget));
  return budget - least;
}

}  // namespace

std::vector<int64_t> in_proportion(const std::vector<double>& scores,
                                   const std::vector<RankRoom>& rooms, int64_t budget) {
  rest_of("in_proportion", scores.size(), rooms, budget);
  const Proportion proportion(scores, rooms);
  const Real level = proportion.level(static_cast<Real>(budget));
  std::vector<int64_t> ranks(rooms.size());
  std::vector<float> cut(rooms.size());
  std::vector<size_t> order(rooms.size());
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = 0; i < rooms.size(); ++i) {
    const Real exact = proportion.exact(i, level);
    ranks[i] = static_cast<int64_t>(std::floor(exact + 1e-9L));  // whole but for rounding is whole
    cut[i] = taken(exact, ranks[i]);
    budget -= ranks[i] * rooms[i].cost;
  }
  std::ranges::stable_sort(order, std::greater(), [&](size_t i) { return cut[i]; });
  for (const size_t i : order) {
    if (cut[i] <= 0 || rooms[i].cost > budget) continue;
    ++ranks[i];
    budget -= rooms[i].cost;
  }
  return ranks;
}

std::vector<int64_t> best_directions(const std::vector<std::vector<double>>& scores,
                                     const std::vector<RankRoom>& rooms, int64_t budget) {
  int64_t left = rest_of("best_directions", scores.size(), rooms, budget);
  std::vector<int64_t> ranks;
  std::vector<std::pair<double, size_t>> order;  // score for a parameter, matrix
  for (size_t i = 0; i < rooms.size(); ++i) {
    ranks.push_back(rooms[i].lowest);
    const auto count = static_cast<int64_t>(scores[i].size());
    for (int64_t d = rooms[i].lowest; d < std::min(rooms[i].highest, count); ++d)
      order.emplace_back(scores[i][d] / static_cast<double>(rooms[i].cost), i);
  }
  std::ranges::stable_sort(order, std::greater(), &std::pair<double, size_t>::first);
  for (const auto& [score, i] : order) {
    if (rooms[i].cost > left) continue;
    ++ranks[i];
    left -= rooms[i].cost;
  }
  return ranks;
}

}  // namespace rankwise::analysis
