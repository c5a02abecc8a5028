// The analysis of adapters against dense updates, in float64.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/analysis.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>

namespace {

using namespace rankwise::analysis;
using rankwise::AdapterFile;
using rankwise::AdapterUpdate;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr double bound = 1e-12;

AdapterUpdate random_update(int64_t out, int64_t in, int64_t rank, bool gated = false,
                            double scaling = 0.7) {
  AdapterUpdate update;
  update.lora_A = torch::randn({rank, in}, torch::kDouble);
  update.lora_B = torch::randn({out, rank}, torch::kDouble);
  if (gated) update.lora_E = torch::randn({rank, 1}, torch::kDouble);
  update.scaling = scaling;
  return update;
}

at::Tensor dense(const AdapterUpdate& update) {
  const at::Tensor A = update.lora_A.to(torch::kDouble), B = update.lora_B.to(torch::kDouble);
  return update.scaling * B.matmul(update.lora_E.defined() ? update.lora_E * A : A);
}

double frobenius(const at::Tensor& matrix) {
  return matrix.norm().item<double>();
}

struct Sizes {
  int64_t out, in, rank;
};
class OfSizes : public testing::TestWithParam<Sizes> {
 protected:
  void SetUp() override { torch::manual_seed(GetParam().rank); }
  AdapterUpdate update(bool gated = false) const {
    const auto [out, in, rank] = GetParam();
    return random_update(out, in, rank, gated);
  }
};
INSTANTIATE_TEST_SUITE_P(Analysis, OfSizes,
                         testing::Values(Sizes{24, 40, 6}, Sizes{7, 5, 0}, Sizes{3, 9, 8},
                                         Sizes{9, 3, 12}, Sizes{1, 1, 1}));

TEST_P(OfSizes, TheSpectrumIsTheDenseOne) {
  const AdapterUpdate one = update(true);
  const DeltaSpectrum found = delta_spectrum(one);
  EXPECT_LT(frobenius((found.U * found.S).matmul(found.V.t()) - dense(one)), bound * 100);
  const at::Tensor S = std::get<1>(torch::linalg_svd(dense(one), false));
  EXPECT_LT(frobenius(found.S - S.narrow(0, 0, found.S.numel())), bound * 100);
}

TEST_P(OfSizes, TruncationsErrorIsTheDroppedTail) {
  const AdapterUpdate one = update();
  const Approximation found = truncate(one, 2);
  const at::Tensor S = std::get<1>(torch::linalg_svd(dense(one), false));
  const auto tail = std::max<int64_t>(S.numel() - 2, 0);
  EXPECT_NEAR(found.error, frobenius(S.narrow(0, S.numel() - tail, tail)), bound * 100);
  EXPECT_NEAR(frobenius(dense(found.update) - dense(one)), found.error, bound * 100);
  EXPECT_LE(found.update.lora_A.size(0), 2);
}

TEST_P(OfSizes, LinearCombinationIsTheSum) {
  const AdapterUpdate one = update(), two = update(true);
  const Approximation found = combine({one, two}, {2, -0.5});
  EXPECT_LT(frobenius(dense(found.update) - 2 * dense(one) + 0.5 * dense(two)), bound * 100);
  EXPECT_EQ(found.error, 0);
}

TEST_P(OfSizes, DistanceIsTheDenseOne) {
  const AdapterUpdate one = update(), two = update(true);
  const Distance found = distance(one, two);
  EXPECT_NEAR(found.absolute, frobenius(dense(one) - dense(two)), bound * 100);
  EXPECT_EQ(distance(one, one).absolute, 0);
}

TEST(Analysis, SimilarityIsTheOverlapOfSubspaces) {
  torch::manual_seed(1);
  const AdapterUpdate one = random_update(20, 30, 4), two = random_update(15, 30, 6, true);
  const at::Tensor grid = subspace_similarity(one, two);
  const at::Tensor V1 = std::get<2>(torch::linalg_svd(dense(one), false)).t();
  const at::Tensor V2 = std::get<2>(torch::linalg_svd(dense(two), false)).t();
  ASSERT_EQ(grid.sizes(), at::IntArrayRef({4, 6}));
  for (int64_t i = 1; i <= 4; ++i)
    for (int64_t j = 1; j <= 6; ++j) {
      const double overlap = frobenius(V1.narrow(1, 0, i).t().matmul(V2.narrow(1, 0, j)));
      EXPECT_NEAR(grid[i - 1][j - 1].item<double>(), overlap * overlap / std::min(i, j), bound);
    }
  EXPECT_EQ(subspace_similarity(one, one, Subspace::lora_B).diagonal().sum().item<double>(), 4);
}

TEST(Analysis, EffectiveRanksOfEqualValues) {
  const EffectiveRanks ranks = effective_ranks(torch::full({10}, 2.0));
  EXPECT_NEAR(ranks.entropy, 10, bound * 10);
  EXPECT_NEAR(ranks.stable, 10, bound);
  EXPECT_THAT(std::vector({ranks.energy_90, ranks.energy_95, ranks.energy_99}),
              ElementsAre(9, 10, 10));
  EXPECT_EQ(effective_ranks(torch::zeros({3})).energy_99, 0);
}

TEST(Analysis, AmplificationOfAWeightsOwnDirectionsIsOne) {
  torch::manual_seed(2);
  const at::Tensor W = torch::randn({30, 20}, torch::kDouble);
  AdapterUpdate own;
  const auto [U, S, Vh] = torch::linalg_svd(W, false);
  own.lora_A = Vh.narrow(0, 0, 3) * S.narrow(0, 0, 3).unsqueeze(1);
  own.lora_B = U.narrow(1, 0, 3);
  const Amplification found = amplification_factor(W, own);
  EXPECT_NEAR(found.factor, 1, bound);
  EXPECT_NEAR(found.along_weight, frobenius(S.narrow(0, 0, 3)), bound * 10);
  EXPECT_LT(found.along_random, found.along_weight);
  EXPECT_THAT(intruder_directions(W, own).indices, ElementsAre());
}

TEST(Analysis, APlantedIntruderIsFound) {
  AdapterUpdate update;
  update.lora_A = 50 * torch::ones({1, 8}) / std::sqrt(8.0);
  update.lora_B = torch::ones({8, 1}) / std::sqrt(8.0);
  const at::Tensor W = torch::diag(torch::tensor({5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0}));
  EXPECT_THAT(intruder_directions(W, update, 0.5, 3).indices, ElementsAre(0));
}

TEST(Analysis, TiesIsTheMeanOfThoseWithTheElectedSign) {
  const auto row = [](std::vector<double> values) {
    AdapterUpdate update;
    update.lora_A = torch::tensor(values, torch::kDouble).unsqueeze(0);
    update.lora_B = torch::ones({1, 1}, torch::kDouble);
    return update;
  };
  const std::vector<AdapterUpdate> updates = {row({4, -3, 1, 0.1}), row({2, 5, -2, 0.2})};
  const CombineOptions options{.method = Combination::ties, .rank = 1, .density = 0.75};
  const at::Tensor wanted = torch::tensor({3.0, 5.0, -2.0, 0.0}, torch::kDouble);
  EXPECT_LT(frobenius(dense(combine(updates, {1, 1}, options).update) - wanted), bound);
}

TEST(Analysis, WhatIsNotFiniteIsNamed) {
  AdapterUpdate update = random_update(4, 5, 2);
  update.module = "q";
  update.lora_B[1][1] = std::numeric_limits<double>::infinity();
  try {
    combine({random_update(4, 5, 2), update}, {1, 1});
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_THAT(error.what(), HasSubstr("combine: lora_B of updates[1] ('q') must be finite"));
  }
}

AdapterFile file_of(const std::string& module, const AdapterUpdate& update) {
  AdapterFile file;
  file.config.rank = update.lora_A.size(0);
  file.config.alpha = update.scaling * static_cast<double>(file.config.rank);
  file.tensors = {{"base_model.model." + module + ".lora_A.weight", update.lora_A},
                  {"base_model.model." + module + ".lora_B.weight", update.lora_B}};
  return file;
}

TEST(Analysis, FilesAreCombinedAndCompared) {
  torch::manual_seed(3);
  const AdapterUpdate one = random_update(6, 8, 2), two = random_update(6, 8, 3);
  const AdapterFile first = file_of("q", one), second = file_of("q", two);
  const AdapterFile sum = combine({first, second, file_of("k", two)}, {1, 2, 3});
  const AdapterFile wanted = file_of("q", combine({one, two}, {1, 2}).update);
  const std::vector<ModuleDistance> found = distances(sum, wanted);
  ASSERT_EQ(found.size(), 2);
  EXPECT_EQ(found[0].module, "k");
  EXPECT_EQ(found[0].distance.relative, 1);
  EXPECT_LT(found[1].distance.relative, bound);
  EXPECT_FALSE(same_function(sum, wanted));
  EXPECT_TRUE(same_function(combine({first, second}, {1, 2}), wanted));
}

}  // namespace
