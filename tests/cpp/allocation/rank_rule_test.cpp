// exchange_rule: budgets kept to the parameter over random events, and the choices it must make.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rank_rule.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

namespace {

using rankwise::exchange_rule;
using rankwise::ExchangeSettings;
using rankwise::GrowthOrder;
using rankwise::RankQuestion;
using testing::ElementsAre;

// Adapters of these ranks whose directions all have their adapter's score.
RankQuestion question(const std::vector<int64_t>& ranks, const std::vector<double>& scores,
                      int64_t cost, int64_t budget) {
  RankQuestion q{.step = 1, .budget = budget};
  for (size_t m = 0; m < ranks.size(); ++m) {
    q.scores.emplace_back(ranks[m], scores[m]);
    q.young.push_back(0);
    q.costs.push_back(cost);
    q.lowest.push_back(1);
    q.highest.push_back(100);
  }
  return q;
}

// The article's example: what one matrix gives up another gets, above the rank it began with.
TEST(ExchangeRule, MovesTheRankOfOneMatrixToAnother) {
  RankQuestion q = question({10, 10}, {0.1, 2}, 50, 1000);
  q.lowest = {5, 1};
  q.highest = {10, 15};
  const auto ranks = exchange_rule({.max_moves = 10})(q);
  EXPECT_THAT(ranks, ElementsAre(5, 15));
  EXPECT_EQ(q.cost(q.ranks()), 1000);
  EXPECT_EQ(q.cost(ranks), 1000);
}

TEST(ExchangeRule, NeverPassesTheSmallerSide) {
  RankQuestion q = question({8, 8}, {0.1, 2}, 30, 480);
  q.highest = {10, 10};  // of a 10 x 20 matrix
  EXPECT_THAT(exchange_rule({.max_moves = 10})(q), ElementsAre(6, 10));
}

TEST(ExchangeRule, ExpectsOfAFurtherDirectionWhatItScoredBefore) {
  RankQuestion q = question({1, 3}, {2, 0.5}, 10, 40);
  EXPECT_THAT(exchange_rule({})(q), ElementsAre(2, 2));
  q.former = {{0.4, 0.1}, {}};
  EXPECT_THAT(exchange_rule({})(q), ElementsAre(1, 3));
  q.former = {{0.4, 0.1}, {0.3}};
  q.budget = 50;  // what is free is given all the same
  EXPECT_THAT(exchange_rule({.max_moves = 1})(q), ElementsAre(2, 3));
  q.former[0][0] = std::numeric_limits<double>::quiet_NaN();  // the first never was there
  q.budget = 40;
  EXPECT_THAT(exchange_rule({})(q), ElementsAre(2, 2));
}

TEST(ExchangeRule, GivesInTheOrderThatWasAsked) {
  RankQuestion q{.step = 1, .budget = 90, .scores = {{4, 1}, {3, 2}, {9, 1.5, 1.2}}};
  q.young = {0, 0, 0};
  q.costs = {10, 10, 10};
  q.lowest = {0, 0, 0};
  q.highest = {4, 4, 4};
  q.unserved = {7, 1, 2};
  const auto ranks = [&](ExchangeSettings settings) {
    settings.max_moves = 1;
    return exchange_rule(settings)(q);
  };
  EXPECT_THAT(ranks({.growth = GrowthOrder::least}), ElementsAre(2, 3, 3));
  EXPECT_THAT(ranks({.growth = GrowthOrder::least, .kth_least = 2}), ElementsAre(3, 2, 3));
  EXPECT_THAT(ranks({.growth = GrowthOrder::least, .kth_least = 9}), ElementsAre(2, 2, 4));
  EXPECT_THAT(ranks({.growth = GrowthOrder::mean}), ElementsAre(2, 2, 4));
  EXPECT_THAT(ranks({.growth = GrowthOrder::gradient}), ElementsAre(3, 2, 3));
}

TEST(ExchangeRule, HysteresisKeepsWhatIsNearlyAsGood) {
  RankQuestion q = question({4, 4}, {0.95, 1}, 10, 80);
  EXPECT_THAT(exchange_rule({.hysteresis = 0.1})(q), ElementsAre(4, 4));
  EXPECT_THAT(exchange_rule({.hysteresis = 0})(q), ElementsAre(3, 5));
  EXPECT_THAT(exchange_rule({.hysteresis = 0, .max_moves = 9})(q), ElementsAre(1, 7));
}

TEST(ExchangeRule, AFallingBudgetDropsTheWorstAndTheLaterOfEquals) {
  RankQuestion q = question({3, 3, 3}, {2, 1, 1}, 10, 60);
  EXPECT_THAT(exchange_rule({.max_moves = 0})(q), ElementsAre(3, 2, 1));
  q.budget = 30;
  EXPECT_THAT(exchange_rule({.max_moves = 0})(q), ElementsAre(1, 1, 1));
}

TEST(ExchangeRule, DropsBelowTheThreshold) {
  RankQuestion q = question({3, 3}, {0.2, 1}, 10, 60);
  EXPECT_THAT(exchange_rule({.threshold = 0.5, .max_moves = 2})(q), ElementsAre(1, 3));
}

TEST(ExchangeRule, YoungDirectionsAreNotDroppedByChoice) {
  RankQuestion q = question({4, 4}, {0.1, 1}, 10, 80);
  q.young = {3, 0};
  EXPECT_THAT(exchange_rule({.max_moves = 9})(q), ElementsAre(3, 5));
  q.young = {0, 1};  // nor do adapters that have some gain more
  EXPECT_THAT(exchange_rule({.max_moves = 9})(q), ElementsAre(4, 4));
  q.budget = 50;  // but where the budget wants it
  EXPECT_THAT(exchange_rule({.max_moves = 0})(q), ElementsAre(1, 4));
}

TEST(ExchangeRule, MovesAreLimited) {
  RankQuestion q = question({10, 10}, {0.1, 2}, 10, 200);
  EXPECT_THAT(exchange_rule({.max_moves = 4})(q), ElementsAre(8, 12));
}

TEST(ExchangeRule, TheBestWeakestDirectionCountsAndTurnsAreTaken) {
  RankQuestion q = question({2, 2, 4}, {0, 0, 0.1}, 10, 80);
  q.scores[0] = {1, 0.9};
  q.scores[1] = {9, 0.5};  // of the higher mean
  EXPECT_THAT(exchange_rule({.max_moves = 2})(q), ElementsAre(3, 2, 3));
  EXPECT_THAT(exchange_rule({.max_moves = 4})(q), ElementsAre(3, 3, 2));
}

TEST(ExchangeRule, WhatNobodyCanHaveStaysInTheBank) {
  RankQuestion q = question({2, 2}, {1, 1}, 10, 47);
  const auto ranks = exchange_rule({})(q);
  EXPECT_EQ(q.cost(ranks), 40);
  q.costs = {30, 7};
  q.budget = 74 + 6;
  EXPECT_EQ(q.cost(exchange_rule({})(q)), 74);
}

TEST(ExchangeRule, TenThousandRandomEvents) {
  std::mt19937_64 random(7);
  const auto uniform = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  int64_t moved = 0;
  for (int event = 0; event < 10000; ++event) {
    RankQuestion q{.step = event};
    int64_t least = 0;
    const int64_t adapters = uniform(1, 8);
    const bool ties = uniform(0, 3) == 0;
    for (int64_t m = 0; m < adapters; ++m) {
      const int64_t rank = uniform(0, 9);
      std::vector<double> scores;
      for (int64_t i = 0; i < rank; ++i)
        scores.push_back(ties ? static_cast<double>(uniform(0, 2))
                              : std::exponential_distribution<double>(1)(random));
      const int64_t young = uniform(0, rank);
      std::sort(scores.begin() + young, scores.end(), std::greater());
      q.scores.push_back(scores);
      q.young.push_back(uniform(0, 2) == 0 ? young : 0);
      if (q.young.back() == 0) std::ranges::sort(q.scores.back(), std::greater());
      q.costs.push_back(uniform(2, 40));
      q.lowest.push_back(uniform(0, rank));
      q.highest.push_back(rank + uniform(0, 4));
      least += q.lowest.back() * q.costs.back();
    }
    q.budget = std::max(least, q.cost(q.ranks()) + uniform(-60, 60));
    const ExchangeSettings settings{.threshold = uniform(0, 1) * 0.3,
                                    .hysteresis = 0.1 * static_cast<double>(uniform(0, 9)),
                                    .max_moves = uniform(-1, 6)};
    const auto ranks = exchange_rule(settings)(q);
    ASSERT_EQ(ranks.size(), q.scores.size());
    for (size_t m = 0; m < ranks.size(); ++m) {
      ASSERT_GE(ranks[m], q.lowest[m]) << event;
      ASSERT_LE(ranks[m], q.highest[m]) << event;
    }
    ASSERT_LE(q.cost(ranks), q.budget) << event;
    ASSERT_EQ(exchange_rule(settings)(q), ranks);
    moved += ranks != q.ranks();
  }
  EXPECT_GT(moved, 5000);
}

}  // namespace
