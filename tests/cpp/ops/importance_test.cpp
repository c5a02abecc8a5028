// The importance passes: the CPU's kernels against the composite form, and the exact selection.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <ops/importance_composite.h>
#include <torch/torch.h>

#include <array>

namespace {

namespace kernels = rankwise::kernels;

std::vector<int64_t> fields(const kernels::Progress& p) {
  return {p.steps, p.skipped_steps, p.budget, p.updates, p.zeros, p.recorded};
}

at::Tensor choosing(int64_t budget) {
  return rankwise::tensor_of({.budget = budget});
}

struct Lists {
  std::vector<at::Tensor> parameters, sensitivity, uncertainty;
  c10::List<std::optional<at::Tensor>> gradients;
  std::vector<int64_t> ranks;
};

// Adapters whose sizes do not fit the vectors, one of them with rank 0 and one longer than a piece.
Lists lists(at::ScalarType dtype) {
  torch::manual_seed(1);
  Lists result;
  for (const auto& [in, out, rank] :
       {std::tuple(7, 5, 3), {33, 1, 4}, {1, 17, 1}, {9000, 70, 5}, {6, 6, 0}, {40, 4100, 13}}) {
    for (const std::array<int64_t, 2> size :
         {std::array<int64_t, 2>{rank, in}, {out, rank}, {rank, 1}}) {
      const at::Tensor parameter = torch::randn(size, dtype);
      const auto average = dtype == at::kDouble ? at::kDouble : at::kFloat;
      result.parameters.push_back(parameter);
      result.gradients.push_back(result.parameters.size() % 7 == 0
                                     ? std::nullopt
                                     : std::optional(torch::randn(size, dtype)));
      result.sensitivity.push_back(torch::rand(size, average));
      result.uncertainty.push_back(torch::rand(size, average));
    }
    result.ranks.push_back(rank);
  }
  return result;
}

TEST(Importance, KernelsAgreeWithTheCompositeForm) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const Lists a = lists(dtype), b = lists(dtype);
    for (const bool score : {false, true}) {
      const at::Tensor x = rankwise::importance_step_(a.parameters, a.gradients, a.sensitivity,
                                                      a.uncertainty, a.ranks, 0.85, 0.8, score);
      const at::Tensor y = rankwise::importance_step_composite_(
          b.parameters, b.gradients, b.sensitivity, b.uncertainty, b.ranks, 0.85, 0.8, score);
      const double tolerance = dtype == at::kDouble ? 1e-13 : 1e-5;
      EXPECT_EQ(x.sizes(), y.sizes());
      EXPECT_TRUE(!score || at::allclose(x, y, tolerance, 0)) << dtype;
      for (size_t i = 0; i < a.sensitivity.size(); ++i) {
        EXPECT_TRUE(at::allclose(a.sensitivity[i], b.sensitivity[i], tolerance, tolerance));
        EXPECT_TRUE(at::allclose(a.uncertainty[i], b.uncertainty[i], tolerance, tolerance));
      }
    }
  }
}

TEST(Importance, ChecksFindOneElement) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    std::vector<at::Tensor> gradients = {torch::zeros({3, 5}, dtype), torch::zeros({9001}, dtype)};
    const auto facts = [&](auto check) {
      const at::Tensor found = check(gradients);
      return std::pair(found[0].item<bool>(), found[1].item<bool>());
    };
    for (const auto check : {&rankwise::importance_check, &rankwise::importance_check_composite}) {
      EXPECT_EQ(facts(check), std::pair(false, false));
      gradients[1][9000] = -1e-7;
      EXPECT_EQ(facts(check), std::pair(false, true));
      for (const double bad : {INFINITY, -INFINITY, NAN}) {
        gradients[1][9000] = bad;
        EXPECT_EQ(facts(check).first, true) << dtype << bad;
      }
      gradients[1][9000] = -0.0;
    }
  }
}

TEST(Importance, MasksAgree) {
  const std::vector<int64_t> ranks = {3, 0, 2};
  const at::Tensor kept = torch::tensor({true, false, true, false, false});
  std::vector<at::Tensor> a, b;
  for (std::vector<at::Tensor>* list : {&a, &b})
    *list = {torch::ones({4, 1}), torch::ones({2, 1}), torch::ones({2, 1}, at::kHalf)};
  const auto version = a[0]._version();
  rankwise::mask_triplets_(a, ranks, kept, choosing(-1));
  rankwise::mask_triplets_composite_(b, ranks, kept, choosing(-1));
  EXPECT_TRUE(a[0].equal(torch::ones({4, 1})) && b[0].equal(a[0]));
  EXPECT_EQ(a[0]._version(), version);
  rankwise::mask_triplets_(a, ranks, kept, choosing(0));
  rankwise::mask_triplets_composite_(b, ranks, kept, choosing(0));
  for (size_t m = 0; m < 3; ++m) EXPECT_TRUE(a[m].equal(b[m])) << m;
  EXPECT_TRUE(a[0].squeeze(1).equal(torch::tensor({1.0f, 0.0f, 1.0f, 1.0f})));
  EXPECT_GT(a[0]._version(), version);
}

std::vector<bool> chosen(const std::vector<double>& scores, const std::vector<int64_t>& ranks,
                         const std::vector<int64_t>& costs, int64_t budget, int64_t min_rank) {
  const auto all = torch::tensor(scores, at::kDouble);
  const auto kept = torch::ones({all.numel()}, at::kBool), other = torch::ones_like(kept);
  rankwise::select_triplets_(kept, all, ranks, costs, min_rank, choosing(budget));
  rankwise::select_triplets_composite_(other, all, ranks, costs, min_rank, choosing(budget));
  EXPECT_TRUE(kept.equal(other));
  const bool* const first = kept.const_data_ptr<bool>();
  return std::vector<bool>(first, first + kept.numel());
}

TEST(Selection, TakesTheBestAndTiesInOrder) {
  using testing::ElementsAre;
  EXPECT_THAT(chosen({1, 3, 2, 3}, {2, 2}, {1, 1}, 2, 0), ElementsAre(0, 1, 0, 1));
  EXPECT_THAT(chosen({5, 5, 5, 5}, {2, 2}, {1, 1}, 3, 0), ElementsAre(1, 1, 1, 0));
  EXPECT_THAT(chosen({0, 0, 0, 0}, {2, 2}, {1, 1}, 0, 0), ElementsAre(0, 0, 0, 0));
  EXPECT_THAT(chosen({1, 2, 3, 4}, {2, 2}, {1, 1}, 4, 0), ElementsAre(1, 1, 1, 1));
}

TEST(Selection, LeavesThePatternWhereNothingIsChosen) {
  const auto kept = torch::tensor({true, false, true});
  const auto before = kept.clone();
  rankwise::select_triplets_(kept, torch::rand({3}, at::kDouble), {3}, {1}, 1, choosing(-1));
  EXPECT_TRUE(kept.equal(before));
}

TEST(Selection, ReservesTheMinimumRankFirst) {
  EXPECT_THAT(chosen({1, 2, 8, 9}, {2, 2}, {1, 1}, 2, 1), testing::ElementsAre(0, 1, 0, 1));
}

TEST(Selection, PassesOverWhatDoesNotFit) {
  EXPECT_THAT(chosen({9, 8, 7, 6}, {2, 2}, {5, 2}, 9, 0), testing::ElementsAre(1, 0, 1, 1));
}

TEST(Progress, SaysWhatEachStepDoes) {
  const at::Tensor budgets = torch::tensor({-1, -1, 9, -1, 5}, at::kLong);
  const auto facts = [](bool not_finite, bool nonzero) {
    return torch::tensor({not_finite, nonzero});
  };
  const auto after = [&](const kernels::Progress& before, std::optional<at::Tensor> found,
                         std::optional<at::Tensor> inf = {}) {
    const at::Tensor now = rankwise::tensor_of(before);
    const at::Tensor next = rankwise::schedule_step(now, found, inf, budgets, 4);
    EXPECT_TRUE(next.equal(rankwise::schedule_step_composite(now, found, inf, budgets, 4)));
    EXPECT_TRUE(now.equal(rankwise::tensor_of(before)));
    return fields(rankwise::progress_of(next));
  };
  using testing::ElementsAre;  // steps, skipped_steps, budget, updates, zeros, recorded
  EXPECT_THAT(after({}, facts(false, true)), ElementsAre(1, 0, -1, 1, 0, 0));
  EXPECT_THAT(after({.steps = 1, .recorded = 3}, facts(false, true)),
              ElementsAre(2, 0, 9, 1, 0, 3));
  EXPECT_THAT(after({.steps = 3}, facts(false, true)), ElementsAre(4, 0, 5, 0, 0, 0));
  EXPECT_THAT(after({.steps = 7}, {}), ElementsAre(8, 0, 5, 0, 0, 0));
  EXPECT_THAT(after({.steps = 1, .budget = 7, .updates = 1}, facts(true, true)),
              ElementsAre(1, 1, -1, 0, 0, 0));
  EXPECT_THAT(after({.steps = 1}, facts(false, false)), ElementsAre(2, 0, 9, 1, 1, 0));
  EXPECT_THAT(after({.zeros = 1}, facts(false, true)), ElementsAre(1, 0, -1, 1, 1, 0));
  for (const auto dtype : {at::kFloat, at::kDouble, at::kHalf, at::kLong}) {
    const auto inf = [&](int value) { return torch::full({1}, value, dtype); };
    EXPECT_THAT(after({.steps = 1}, {}, inf(0)), ElementsAre(2, 0, 9, 1, 0, 0));
    EXPECT_THAT(after({.steps = 1}, facts(false, false), inf(2)), ElementsAre(1, 1, -1, 0, 0, 0));
  }
}

TEST(History, CountsARowThatBringsSomethingNewOrFreezes) {
  const auto scores = torch::tensor({1.0, 4.0, 2.0, 3.0}, at::kDouble);
  const auto history = [&](auto record) {
    const auto choices = torch::zeros({4, 4}, at::kLong),
               summaries = torch::zeros({4, 4}, at::kDouble);
    std::vector<int64_t> counts;
    for (const auto& [step, budget, first] :
         {std::tuple(1, 3, 1), {2, 3, 1}, {3, -1, 0}, {4, 2, 1}, {5, 2, 0}, {9, 2, 0}}) {
      const int64_t recorded = counts.empty() ? 0 : counts.back();
      const at::Tensor now =
          rankwise::tensor_of({.steps = step, .budget = budget, .recorded = recorded});
      const auto kept = torch::tensor({first == 1, true, false, false});
      record(choices, summaries, now, scores, kept, std::vector<int64_t>{1, 3}, 9);
      counts.push_back(rankwise::progress_of(now).recorded);
    }
    EXPECT_THAT(counts, testing::ElementsAre(1, 1, 1, 2, 3, 4));
    EXPECT_TRUE(choices.equal(
        torch::tensor({{1, 3, 1, 1}, {4, 2, 1, 1}, {5, 2, 0, 1}, {9, 2, 0, 1}}, at::kLong)));
    EXPECT_TRUE(summaries[0].equal(torch::tensor({2.5, 4.0, 1.0, 3.0}, at::kDouble)));
    EXPECT_TRUE(summaries[3].equal(torch::tensor({2.5, 4.0, 4.0, 3.0}, at::kDouble)));
  };
  history(rankwise::record_choice_);
  history(rankwise::record_choice_composite_);
}

}  // namespace
