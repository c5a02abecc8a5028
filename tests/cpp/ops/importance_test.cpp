// The importance passes: the CPU's kernels against the composite form, and the exact selection.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <ops/importance_composite.h>
#include <torch/torch.h>

#include <array>

namespace {

using rankwise::select_triplets;

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
      EXPECT_TRUE(at::allclose(x, y, tolerance, 0)) << dtype;
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
  rankwise::mask_triplets_(a, ranks, kept);
  rankwise::mask_triplets_composite_(b, ranks, kept);
  for (size_t m = 0; m < 3; ++m) EXPECT_TRUE(a[m].equal(b[m])) << m;
  EXPECT_TRUE(a[0].squeeze(1).equal(torch::tensor({1.0f, 0.0f, 1.0f, 1.0f})));
  EXPECT_GT(a[0]._version(), version);
}

std::vector<bool> chosen(const std::vector<double>& scores, const std::vector<int64_t>& ranks,
                         const std::vector<int64_t>& costs, int64_t budget, int64_t min_rank) {
  const at::Tensor kept =
      select_triplets(torch::tensor(scores, at::kDouble), ranks, costs, budget, min_rank);
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

TEST(Selection, ReservesTheMinimumRankFirst) {
  EXPECT_THAT(chosen({1, 2, 8, 9}, {2, 2}, {1, 1}, 2, 1), testing::ElementsAre(0, 1, 0, 1));
}

TEST(Selection, PassesOverWhatDoesNotFit) {
  EXPECT_THAT(chosen({9, 8, 7, 6}, {2, 2}, {5, 2}, 9, 0), testing::ElementsAre(1, 0, 1, 1));
}

}  // namespace
