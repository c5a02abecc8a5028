// The singular directions of updates against the dense product, in float64.
#include "../../../csrc/allocation/spectrum.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace {

using rankwise::Repacked;
using rankwise::Spectrum;

constexpr double bound = 1e-12;

double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).norm().item<double>() / std::max(b.norm().item<double>(), 1e-3);
}

// Factors, and their gradients for a dense dL/dM.
struct Problem {
  at::Tensor A, B, G;
  explicit Problem(int64_t rank, int64_t in = 40, int64_t out = 24) {
    torch::manual_seed(rank);
    A = torch::randn({rank, in}, torch::kDouble);
    B = torch::randn({out, rank}, torch::kDouble);
    G = torch::randn({out, in}, torch::kDouble);
  }
  at::Tensor M() const { return B.matmul(A); }
  at::Tensor gA() const { return B.t().matmul(G); }
  at::Tensor gB() const { return G.matmul(A.t()); }
};

class Ranks : public testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(Spectrum, Ranks, testing::Values(1, 2, 6, 24));

TEST_P(Ranks, IsTheDenseProducts) {
  const Problem p(GetParam());
  const Spectrum s = rankwise::spectrum_of(p.A, p.B);
  EXPECT_LT(distance(s.S, torch::linalg_svdvals(p.M()).narrow(0, 0, GetParam())), bound);
  EXPECT_LT(distance((s.U * s.S).matmul(s.V.t()), p.M()), bound);
  EXPECT_LT(distance(s.BU, p.B.t().matmul(s.U)), bound);
  EXPECT_LT(distance(s.AV, p.A.matmul(s.V)), bound);
}

TEST_P(Ranks, BothFormsOfTheGradientAreTheDirectOne) {
  const Problem p(GetParam());
  const Spectrum s = rankwise::spectrum_of(p.A, p.B);
  const at::Tensor direct = (s.U * p.G.matmul(s.V)).sum(0);
  const at::Tensor zero_A = torch::zeros_like(p.A), zero_B = torch::zeros_like(p.B);
  EXPECT_LT(distance(2 * rankwise::singular_gradients(s, p.gA(), zero_B), direct), bound);
  EXPECT_LT(distance(2 * rankwise::singular_gradients(s, zero_A, p.gB()), direct), bound);
  EXPECT_LT(distance(p.B.t().matmul(p.gB()), p.gA().matmul(p.A.t())), bound);
}

TEST_P(Ranks, RepackedFactorsAndMapsAgree) {
  const Problem p(GetParam());
  const Spectrum s = rankwise::spectrum_of(p.A, p.B);
  std::vector<int64_t> all(GetParam());
  std::iota(all.begin(), all.end(), 0);
  std::vector<double> lengths;
  for (int64_t i = 0; i < GetParam(); ++i) lengths.push_back(0.5 + 0.1 * static_cast<double>(i));
  const Repacked whole = rankwise::repacked(s, all, lengths);
  EXPECT_LT(distance(whole.B.matmul(whole.A), p.M()), bound);
  EXPECT_LT(distance(p.B.matmul(whole.T_B), whole.B), bound);
  EXPECT_LT(distance(whole.T_A.t().matmul(p.A), whole.A), bound);
  // Gradients with respect to the new factors.
  EXPECT_LT(distance(p.gB().matmul(whole.T_A), p.G.matmul(whole.A.t())), bound);
  EXPECT_LT(distance(whole.T_B.t().matmul(p.gA()), whole.B.t().matmul(p.G)), bound);

  const std::vector<int64_t> kept(all.begin(), all.begin() + (GetParam() + 1) / 2);
  const Repacked part = rankwise::repacked(s, kept, lengths);
  const double change = (part.B.matmul(part.A) - p.M()).norm().item<double>();
  const double dropped = s.S.narrow(0, kept.size(), GetParam() - kept.size()).norm().item<double>();
  EXPECT_NEAR(change, dropped, bound * s.S[0].item<double>());
}

TEST(Spectrum, EmptyDirectionsBeginAgain) {
  Problem p(4);
  p.B.select(1, 1).zero_();
  p.A.select(0, 3).copy_(p.A.select(0, 2));
  const Spectrum s = rankwise::spectrum_of(p.A, p.B);
  EXPECT_FALSE(s.empty(1));
  EXPECT_TRUE(s.empty(2) && s.empty(3));
  const at::Tensor gradients = rankwise::singular_gradients(s, p.gA(), p.gB());
  EXPECT_TRUE(gradients.isfinite().all().item<bool>());
  const Repacked all = rankwise::repacked(s, {0, 1, 2, 3}, {0.5, 0.5, 0.5, 0.5});
  EXPECT_LT(distance(all.B.matmul(all.A), p.M()), bound);
  EXPECT_EQ(all.B.narrow(1, 2, 2).count_nonzero().item<int64_t>(), 0);
  EXPECT_NEAR(all.A.select(0, 3).norm().item<double>(), 0.5, bound);
}

TEST(Spectrum, OfNothingIsNothing) {
  Problem p(3);
  p.B.zero_();
  const Spectrum s = rankwise::spectrum_of(p.A, p.B);
  EXPECT_TRUE(s.empty(0));
  const Repacked all = rankwise::repacked(s, {0, 1, 2}, {1, 1, 1});
  EXPECT_EQ(all.B.count_nonzero().item<int64_t>(), 0);
  EXPECT_LT(distance(all.A.matmul(all.A.t()), torch::eye(3, torch::kDouble)), bound);
}

TEST(Spectrum, ColumnsAreContinuedByTheDirectionsNearestToThem) {
  const at::Tensor Q = std::get<0>(torch::linalg_qr(torch::randn({24, 3}, torch::kDouble)));
  const at::Tensor R = std::get<0>(torch::linalg_qr(torch::randn({40, 3}, torch::kDouble)));
  const at::Tensor size = torch::tensor({1.0, 3.0, 2.0}, torch::kDouble);
  const Spectrum s = rankwise::spectrum_of(R.t().contiguous(), Q * size);
  EXPECT_THAT(rankwise::continued(s, R.t(), Q * size), testing::ElementsAre(2, 0, 1));
}

TEST(Spectrum, DirectionsThatLieApartStayAsTheyAre) {
  const at::Tensor Q = std::get<0>(torch::linalg_qr(torch::randn({24, 3}, torch::kDouble)));
  const at::Tensor R = std::get<0>(torch::linalg_qr(torch::randn({40, 3}, torch::kDouble)));
  const at::Tensor A = R.t() * 0.6, B = Q * torch::tensor({3.0, 2.0, 1.0}, torch::kDouble);
  const Repacked same = rankwise::repacked(rankwise::spectrum_of(A, B), {0, 1, 2}, {0.6, 0.6, 0.6});
  EXPECT_LT(distance(same.A.abs(), A.abs()), bound);
  EXPECT_LT(distance(same.B.abs(), B.abs()), bound);
  EXPECT_LT(distance(same.T_A.abs(), torch::eye(3, torch::kDouble)), bound);
  EXPECT_LT(distance(same.T_B.abs(), torch::eye(3, torch::kDouble)), bound);
}

TEST(Spectrum, FreshRowsAreOrthonormalToTheOthers) {
  const Problem p(5);
  const at::Tensor rows = rankwise::fresh_rows(p.A, {}, 3, 11);
  EXPECT_LT(distance(rows.matmul(rows.t()), torch::eye(3, torch::kDouble)), bound);
  EXPECT_LT((rows.matmul(p.A.t())).abs().max().item<double>(), bound * 10);
  EXPECT_TRUE(rows.equal(rankwise::fresh_rows(p.A, {}, 3, 11)));
  EXPECT_FALSE(rows.equal(rankwise::fresh_rows(p.A, {}, 3, 12)));
  EXPECT_EQ(rankwise::fresh_rows(p.A.narrow(0, 0, 0), {}, 2, 1).sizes(), at::IntArrayRef({2, 40}));
}

}  // namespace
