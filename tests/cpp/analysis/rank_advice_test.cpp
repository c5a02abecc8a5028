// Advice on ranks: the rules within a budget against every choice there is, and the evidence.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>

#include "../io/temporary_folder.h"

namespace {

using namespace rankwise::analysis;
using rankwise::AdapterFile;
using rankwise::AdapterUpdate;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;
using Ranks = std::vector<int64_t>;

int64_t cost_of(const Ranks& ranks, const std::vector<RankRoom>& rooms) {
  int64_t cost = 0;
  for (size_t i = 0; i < ranks.size(); ++i) cost += ranks[i] * rooms[i].cost;
  return cost;
}

// Every choice within rooms and budget.
std::vector<Ranks> choices(const std::vector<RankRoom>& rooms, int64_t budget) {
  std::vector<Ranks> all = {{}};
  for (const RankRoom& room : rooms) {
    std::vector<Ranks> longer;
    for (const Ranks& ranks : all)
      for (int64_t rank = room.lowest; rank <= room.highest; ++rank) {
        longer.push_back(ranks);
        longer.back().push_back(rank);
      }
    all = std::move(longer);
  }
  std::erase_if(all, [&](const Ranks& ranks) { return cost_of(ranks, rooms) > budget; });
  return all;
}

// Problems of one to four matrices.
struct Problem {
  std::vector<RankRoom> rooms;
  int64_t budget = 0;
  explicit Problem(std::mt19937& random, bool alike = false) {
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
    const int64_t cost = 1 + below(9);
    for (int64_t count = 1 + below(4); count > 0; --count) {
      const int64_t highest = below(5);
      rooms.push_back({alike ? cost : 1 + below(9), below(highest + 1), highest});
      budget += rooms.back().cost * rooms.back().lowest;
    }
    budget += below(60);
  }
};

// The exact ranks by bisection.
std::vector<double> exact_ranks(const std::vector<double>& scores, const Problem& problem) {
  const auto at = [&](double level) {
    std::vector<double> ranks;
    for (size_t i = 0; i < scores.size(); ++i)
      ranks.push_back(std::clamp(level * scores[i], double(problem.rooms[i].lowest),
                                 double(problem.rooms[i].highest)));
    return ranks;
  };
  double low = 0, high = 1000;
  for (int i = 0; i < 80; ++i) {
    const double middle = (low + high) / 2;
    const std::vector<double> ranks = at(middle);
    double cost = 0;
    for (size_t j = 0; j < ranks.size(); ++j) cost += ranks[j] * double(problem.rooms[j].cost);
    (cost <= double(problem.budget) ? low : high) = middle;
  }
  return at(low);
}

TEST(RankBudget, InProportionIsLessThanARankFromExactAndLeavesNothingOfUse) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    const Problem problem(random);
    std::vector<double> scores;
    for (size_t i = 0; i < problem.rooms.size(); ++i)
      scores.push_back(std::array{0.0, 0.1, 1.0, 1.5, 3.0}[random() % 5]);
    const Ranks ranks = in_proportion(scores, problem.rooms, problem.budget);
    const std::vector<double> exact = exact_ranks(scores, problem);
    const int64_t left = problem.budget - cost_of(ranks, problem.rooms);
    ASSERT_GE(left, 0);
    for (size_t i = 0; i < ranks.size(); ++i) {
      EXPECT_GE(ranks[i], problem.rooms[i].lowest);
      EXPECT_LE(ranks[i], problem.rooms[i].highest);
      EXPECT_LT(std::abs(double(ranks[i]) - exact[i]), 1 + 1e-9);
      const bool short_of_exact = double(ranks[i]) + 1e-9 < exact[i];
      EXPECT_TRUE(!short_of_exact || problem.rooms[i].cost > left);
    }
  }
}

TEST(RankBudget, RoundingDecidesNoTie) {
  // Exact: 4/3, 1/3, 1/3; the rest is for the first, though 1/3 * 4 is less than 4/3 in binary.
  EXPECT_THAT(in_proportion({4, 1, 1}, {{1, 0, 9}, {1, 0, 9}, {1, 0, 9}}, 2), ElementsAre(2, 0, 0));
  EXPECT_THAT(in_proportion({1, 4, 1}, {{1, 0, 9}, {1, 0, 9}, {1, 0, 9}}, 2), ElementsAre(1, 1, 0));
  EXPECT_THAT(in_proportion({0.1, 0.2, 0.3}, {{7, 0, 9}, {7, 0, 9}, {7, 0, 9}}, 42),
              ElementsAre(1, 2, 3));
  EXPECT_THAT(in_proportion({1e-300, 1e300}, {{2, 0, 3}, {2, 0, 4}}, 100), ElementsAre(3, 4));
}

TEST(RankBudget, NoChoiceOfDirectionsHasALargerSumWhereAllCostTheSame) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 500; ++trial) {
    const Problem problem(random, /*alike=*/true);
    std::vector<std::vector<double>> scores;
    for (const RankRoom& room : problem.rooms) {
      scores.emplace_back();
      for (int64_t i = 0; i < room.highest; ++i)
        scores.back().push_back(std::array{0.0, 0.25, 1.0, 2.0, 7.0}[random() % 5]);
      std::ranges::sort(scores.back(), std::greater());
    }
    const auto sum_of = [&](const Ranks& ranks) {
      double sum = 0;
      for (size_t i = 0; i < ranks.size(); ++i)
        sum = std::accumulate(scores[i].begin(), scores[i].begin() + ranks[i], sum);
      return sum;
    };
    double best = 0;
    for (const Ranks& ranks : choices(problem.rooms, problem.budget))
      best = std::max(best, sum_of(ranks));
    const Ranks ranks = best_directions(scores, problem.rooms, problem.budget);
    EXPECT_LE(cost_of(ranks, problem.rooms), problem.budget);
    EXPECT_EQ(sum_of(ranks), best);
  }
}

TEST(RankBudget, WhatIsRefused) {
  const std::vector<RankRoom> rooms = {{2, 1, 4}, {3, 1, 4}};
  EXPECT_EQ(message_of<std::invalid_argument>([&] { in_proportion({1}, rooms, 9); }),
            "in_proportion: rooms must be 1 like the scores, got 2");
  EXPECT_EQ(message_of<std::invalid_argument>([&] {
              best_directions({{1}, {1}}, rooms, 4);
            }),
            "best_directions: budget must be at least 5, which the lowest ranks cost, got 4");
}

RankEvidence matrices(const std::vector<double>& scores) {
  RankEvidence evidence;
  for (size_t i = 0; i < scores.size(); ++i)
    evidence.matrices.push_back({"m" + std::to_string(i), 4, 6, {scores[i]}});
  return evidence;
}

TEST(RankAdvice, StaysWithinTheBudgetAndTheRooms) {
  const RankAdvice advice = rank_advice(matrices({3, 1, 0}), {.budget = 75});
  EXPECT_THAT(advice.ranks, ElementsAre(Pair("m0", 4), Pair("m1", 2), Pair("m2", 1)));
  EXPECT_EQ(advice.spent, 70);
  EXPECT_EQ(rank_advice(matrices({1, 1, 1}), {.mean_rank = 2}).budget, 60);
  EXPECT_THAT(rank_advice(matrices({3, 1, 0}), {.budget = 50, .min_rank = 0, .max_rank = 3}).ranks,
              ElementsAre(Pair("m0", 3), Pair("m1", 2), Pair("m2", 0)));
}

TEST(RankAdvice, WhatIsRefused) {
  const auto message = [](const RankEvidence& evidence, const AdviceOptions& options) {
    return message_of<std::invalid_argument>([&] { rank_advice(evidence, options); });
  };
  const RankEvidence two = matrices({1, 2});
  EXPECT_THAT(message(two, {}), HasSubstr("one of budget and mean_rank must be given, got none"));
  EXPECT_THAT(message(two, {.budget = 9, .mean_rank = 1}), HasSubstr("got both"));
  EXPECT_EQ(message(two, {.budget = 19}),
            "rank_advice: budget must be at least 20, which a rank of 1 for all costs, got 19");
  EXPECT_THAT(message(two, {.mean_rank = 0}), HasSubstr("mean_rank must be a number > 0"));
  EXPECT_THAT(message(two, {.budget = 99, .min_rank = -1}), HasSubstr("min_rank must be >= 0"));
  EXPECT_THAT(message(two, {.budget = 99, .min_rank = 3, .max_rank = 2}), HasSubstr("max_rank"));
  EXPECT_THAT(message(matrices({std::nan("")}), {.budget = 99}), HasSubstr("'m0' must be finite"));
  EXPECT_THAT(message({}, {.budget = 99}), HasSubstr("at least one matrix"));
  RankEvidence sizeless = two;
  sizeless.matrices[0].out = -1;
  EXPECT_THAT(message(sizeless, {.budget = 99}), HasSubstr("'m0' must have a size [out, in]"));
  sizeless.matrices[0].out = 4;
  sizeless.matrices[1].scores = {1, 1};
  EXPECT_THAT(message(sizeless, {.budget = 99}), HasSubstr("'m1' must be one, got 2"));
  EXPECT_THAT(message(two, {.mean_rank = INFINITY}), HasSubstr("mean_rank must be a number > 0"));
  RankEvidence rising = two;
  rising.of_directions = true;
  rising.matrices[1].scores = {1, 2};
  EXPECT_THAT(message(rising, {.budget = 99}), HasSubstr("'m1' must be falling"));
}

AdapterUpdate update_of(const std::string& module, const std::vector<double>& values,
                        int64_t size = 6) {
  const auto count = static_cast<int64_t>(values.size());
  const auto basis = [&] {
    return std::get<0>(torch::linalg_qr(torch::randn({size, size}, torch::kDouble)));
  };
  AdapterUpdate update{.module = module, .lora_A = {}, .lora_B = {}, .lora_E = {}};
  update.lora_A = basis().narrow(0, 0, count);
  update.lora_B = basis().narrow(1, 0, count) * torch::tensor(values, torch::kDouble);
  return update;
}

TEST(RankEvidence, EnergiesGiveTheLeastLossOfAllTruncations) {
  torch::manual_seed(1);
  const AdapterFile file = rankwise::fold_adapter(
      {update_of("a", {3, 0.1, 0.05}), update_of("b", {2, 1.5, 1}), update_of("c", {0.2, 0, 0})});
  const RankEvidence evidence = update_energies(file);
  EXPECT_NEAR(evidence.matrices[1].scores[1], 2.25, 1e-9);
  EXPECT_THAT(rank_advice(evidence, {.budget = 12 * 4, .min_rank = 0}).ranks,
              ElementsAre(Pair("a", 1), Pair("b", 3), Pair("c", 0)));
  EXPECT_THAT(rank_advice(evidence, {.budget = 12 * 4}).ranks,
              ElementsAre(Pair("a", 1), Pair("b", 2), Pair("c", 1)));
  EXPECT_EQ(rank_advice(evidence, {.budget = 1000}).spent, 12 * 9);
}

// Directions that all seeds have, and random ones after them.
AdapterUpdate planted(const std::string& module, int64_t shared, int64_t rank) {
  const int64_t size = 200;
  const auto options = torch::TensorOptions(torch::kDouble);
  const auto orthonormal = [](const at::Tensor& columns) {
    return std::get<0>(torch::linalg_qr(columns));
  };
  torch::manual_seed(99);
  const auto common = torch::randn({size, shared}, options);
  torch::manual_seed(rank);
  const auto V = orthonormal(torch::cat({common, torch::randn({size, rank - shared}, options)}, 1));
  const auto U = orthonormal(torch::randn({size, rank}, options));
  return {.module = module,
          .lora_A = V.t(),
          .lora_B = U * torch::linspace(2, 1, rank, options),
          .lora_E = {}};
}

TEST(RankEvidence, AgreementCountsWhatSeedsShare) {
  for (const int64_t shared : {0, 1, 5}) {
    const AdapterUpdate first = planted("q", shared, 8), second = planted("q", shared, 12);
    const Agreement found = agreement(first, second);
    EXPECT_NEAR(found.directions, double(shared), 1) << shared;
    EXPECT_EQ(found.chance, 8 * 12 / 200.0);
    EXPECT_NEAR(found.overlap, subspace_similarity(first, second)[-1][-1].item<double>() * 8,
                1e-12);
    EXPECT_LE(agreement(first, second, Subspace::output).directions, 1);
    EXPECT_EQ(agreement(first, first).directions, 8);
  }
  const AdapterUpdate full = update_of("q", {1, 1, 1, 1, 1, 1});
  EXPECT_EQ(agreement(full, update_of("q", {1, 2, 3, 4, 5, 6})).directions, 0);
  EXPECT_EQ(agreement(update_of("q", {0, 0}), full).overlap, 0);
  const AdapterFile one = rankwise::fold_adapter({planted("k", 1, 8), planted("q", 5, 8)});
  const AdapterFile two = rankwise::fold_adapter({planted("k", 1, 9), planted("q", 5, 9)});
  const RankEvidence evidence = seed_agreement(one, two);
  EXPECT_GT(evidence.matrices[1].scores[0], evidence.matrices[0].scores[0]);
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { seed_agreement(one, rankwise::fold_adapter({planted("k", 1, 8)})); }),
              HasSubstr("the same modules, got 'q' in one alone"));
}

TEST(RankEvidence, RanksOfAnAllocator) {
  torch::manual_seed(2);
  const auto layer = rankwise::nn::LoRALinearOptions(6, 4).rank(3);
  torch::nn::Sequential model(rankwise::nn::AdaLoRALinear{layer});
  rankwise::RankAllocator allocator(
      *model,
      rankwise::AdaLoRAOptions().initial_rank(3).target_rank(1).total_steps(4).allocation_interval(
          1));
  EXPECT_THAT(allocator.sizes(), ElementsAre(Pair(4, 6)));
  EXPECT_THAT(allocated_ranks(allocator).matrices[0].scores, ElementsAre(3));
  for (int step = 0; step < 4; ++step) {
    model->forward(torch::randn({4, 6})).square().sum().backward();
    allocator.step();
  }
  EXPECT_THAT(allocated_ranks(allocator).matrices[0].scores, ElementsAre(1));
  double sum = 0;
  for (const auto& allocation : allocator.history()) sum += double(allocation.ranks[0]);
  const double mean = sum / double(allocator.history().size());
  EXPECT_THAT(allocated_ranks(allocator, 99).matrices[0].scores, ElementsAre(mean));
  EXPECT_THROW(allocated_ranks(allocator, 0), std::invalid_argument);
}

TEST(RankEvidence, GradientsAndInputs) {
  torch::manual_seed(3);
  const auto one = torch::randn({3, 5}), two = torch::randn({3, 5}).to(torch::kBFloat16);
  const RankEvidence squares = squared_gradients({{{"q", one}}, {{"q", two}}});
  const auto mean = [](const torch::Tensor& t) { return t.to(torch::kDouble).square().mean(); };
  EXPECT_NEAR(squares.matrices[0].scores[0], ((mean(one) + mean(two)) / 2).item<double>(), 1e-6);
  EXPECT_EQ(squares.matrices[0].in, 5);
  EXPECT_THROW(squared_gradients({{{"q", one}}, {{"k", two}}}), std::invalid_argument);
  EXPECT_THROW(squared_gradients({{{"q", one / 0}}}), std::invalid_argument);

  const auto rows = torch::randn({50, 5}) * torch::tensor({3.0, 2.0, 1.0, 0.5, 0.1}) + 7;
  const RankEvidence shares = input_variances({{"q", 3, rows}});
  const auto variances = std::get<0>(torch::linalg_eigh(rows.t().cov())).flip(0);
  const auto wanted = variances / variances.sum();
  ASSERT_EQ(shares.matrices[0].scores.size(), 3);  // no more than the smaller side
  for (int64_t i = 0; i < 3; ++i)
    EXPECT_NEAR(shares.matrices[0].scores[i], wanted[i].item<double>(), 1e-5);
  EXPECT_THROW(input_variances({{"q", 3, rows.narrow(0, 0, 2)}}), std::invalid_argument);
}

}  // namespace
