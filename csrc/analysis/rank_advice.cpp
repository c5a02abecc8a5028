// rank_advice: evidence that is checked, and the ranks that follow from it.
#include <c10/util/StringUtil.h>
#include <rankwise/rank_advice.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "factors.h"

namespace rankwise::analysis {
namespace {

void require(bool fits, const std::string& wanted, const std::string& got) {
  if (!fits) fail("rank_advice", wanted + ", got " + got);
}

void check(const RankEvidence& evidence) {
  require(!evidence.matrices.empty(), "evidence must be of at least one matrix", "none");
  for (const auto& [module, out, in, scores] : evidence.matrices) {
    const std::string name = "scores of '" + module + "' must be ";
    require(out >= 0 && in >= 0, "'" + module + "' must have a size [out, in]",
            c10::str("[", out, ", ", in, "]"));
    require(std::ranges::all_of(scores, [](double s) { return std::isfinite(s) && s >= 0; }),
            name + "finite numbers >= 0", c10::str(scores));
    if (evidence.of_directions)
      require(std::ranges::is_sorted(scores, std::greater()), name + "falling", c10::str(scores));
    else
      require(scores.size() == 1, name + "one", std::to_string(scores.size()));
  }
}

std::vector<RankRoom> rooms_of(const RankEvidence& evidence, const AdviceOptions& options) {
  const int64_t least = options.min_rank;
  require(least >= 0, "min_rank must be >= 0", std::to_string(least));
  require(options.max_rank.value_or(least) >= least,
          "max_rank must be an integer >= " + std::to_string(least) + " or none",
          std::to_string(options.max_rank.value_or(0)));
  std::vector<RankRoom> rooms;
  for (const auto& [module, out, in, scores] : evidence.matrices) {
    const int64_t side = std::min(out, in), lowest = std::min(least, side);
    const auto known = evidence.of_directions ? static_cast<int64_t>(scores.size()) : side;
    const int64_t highest = std::min({side, known, options.max_rank.value_or(side)});
    rooms.push_back({out + in, lowest, std::max(lowest, highest)});
  }
  return rooms;
}

int64_t budget_of(const std::vector<RankRoom>& rooms, const AdviceOptions& options) {
  require(options.budget.has_value() != options.mean_rank.has_value(),
          "one of budget and mean_rank must be given", options.budget ? "both" : "none");
  if (options.budget) return *options.budget;
  const double rank = *options.mean_rank;
  require(std::isfinite(rank) && rank > 0, "mean_rank must be a number > 0", std::to_string(rank));
  int64_t cost = 0;
  for (const RankRoom& room : rooms) cost += room.cost;
  return std::llrint(rank * static_cast<double>(cost));  // halves to even, as Python rounds
}

}  // namespace

RankAdvice rank_advice(const RankEvidence& evidence, const AdviceOptions& options) {
  check(evidence);
  const std::vector<RankRoom> rooms = rooms_of(evidence, options);
  RankAdvice advice;
  advice.budget = budget_of(rooms, options);
  int64_t least = 0;
  for (const RankRoom& room : rooms) least += room.cost * room.lowest;
  require(advice.budget >= least,
          c10::str("budget must be at least ", least, ", which a rank of ", options.min_rank,
                   " for all costs"),
          std::to_string(advice.budget));
  std::vector<std::vector<double>> scores;
  std::vector<double> firsts;
  for (const MatrixEvidence& matrix : evidence.matrices) {
    scores.push_back(matrix.scores);
    if (!evidence.of_directions) firsts.push_back(matrix.scores[0]);
  }
  const std::vector<int64_t> ranks = evidence.of_directions
                                         ? best_directions(scores, rooms, advice.budget)
                                         : in_proportion(firsts, rooms, advice.budget);
  for (size_t i = 0; i < ranks.size(); ++i) {
    advice.ranks.emplace_back(evidence.matrices[i].module, ranks[i]);
    advice.spent += ranks[i] * rooms[i].cost;
  }
  return advice;
}

}  // namespace rankwise::analysis
