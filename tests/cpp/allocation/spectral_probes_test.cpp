// SpectralAllocator's probes: what they tell of the gradient, and that they leave nothing behind.
#include "spectral_adapters.h"

namespace rankwise {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

SpectralOptions probing(int64_t probes) {
  return options().allocation_interval(2).probes(probes);
}

// One event after the step that sets the probes, for a gradient G of the update.
void event_of(SpectralAllocator& allocator, Adapters& adapters, const at::Tensor& G) {
  for (int step = 0; step < 2; ++step) {
    adapters.set_gradients(0, G);
    allocator.step();
  }
}

// G (I - V V^T), V the row space of A.
at::Tensor unserved(const at::Tensor& G, const at::Tensor& A) {
  const at::Tensor V = std::get<0>(torch::linalg_qr(A.t()));
  return G - G.matmul(V).matmul(V.t());
}

TEST(SpectralProbes, TheirEnergyIsUnbiased) {
  torch::manual_seed(4);
  const at::Tensor G = torch::randn({14, 20}, torch::kDouble);
  double sum = 0, wanted = 0;
  const int draws = 2000;
  for (int seed = 0; seed < draws; ++seed) {
    Adapters adapters({{20, 14, 3, 7}});
    wanted = unserved(G, adapters.A[0].detach().narrow(0, 0, 3)).square().sum().item<double>();
    SpectralAllocator allocator(adapters.list(),
                                probing(4).seed(seed).rule([&](const RankQuestion& question) {
                                  sum += question.unserved.at(0);
                                  return question.ranks();
                                }));
    event_of(allocator, adapters, G);
  }
  // Of one draw the deviation is below a quarter, so that this is four of the mean's.
  EXPECT_NEAR(sum / draws, wanted, 0.022 * wanted);
}

TEST(SpectralProbes, NewDirectionsBeginWhereTheGradientIs) {
  Adapters adapters({{20, 14, 3, 6}});
  const at::Tensor A = adapters.A[0].detach();
  const at::Tensor v = unserved(torch::randn({1, 20}, torch::kDouble), A.narrow(0, 0, 3));
  const at::Tensor G = torch::randn({14, 1}, torch::kDouble).matmul(v);
  SpectralAllocator allocator(
      adapters.list(),
      probing(2).initial_budget(1000).rule([](const auto&) { return std::vector<int64_t>{5}; }));
  const double length = A.narrow(0, 0, 3).norm(2, 1).median().item<double>();
  event_of(allocator, adapters, G);
  EXPECT_THAT(adapters.ranks, ElementsAre(5));
  const at::Tensor cosine = A[3].dot(v[0]) / (length * v.norm());
  EXPECT_NEAR(std::abs(cosine.item<double>()), 1, 1e-10);
  EXPECT_NEAR(A[4].norm().item<double>(), length, 1e-10);  // a random one beside it
  EXPECT_NEAR(A[4].dot(v[0]).item<double>(), 0, 1e-10);
  EXPECT_FALSE(adapters.B[0].detach().narrow(1, 3, 3).any().item<bool>());
}

TEST(SpectralProbes, ComeForOneStepAndLeaveZeros) {
  Train run;
  WithCallbacks<torch::optim::AdamW> optimizer(run.parameters(), torch::optim::AdamWOptions(1e-2));
  SpectralAllocator allocator(run.adapters.list(), schedule().probes(2).max_rank(4));
  allocator.attach(optimizer);
  const auto trace = [&](const at::Tensor& tensor, int64_t dim, int64_t rank) {
    return tensor.detach().narrow(dim, rank, tensor.size(dim) - rank).any().item<bool>();
  };
  for (int step = 1; step <= 60; ++step) {
    const at::Tensor before = run.forward();
    run.step(optimizer);
    const bool before_event = step % 5 == 4 && step >= 9 && step < 50;
    for (size_t m = 0; m < 2; ++m) {
      const int64_t rank = allocator.ranks()[m].second;
      ASSERT_EQ(run.adapters.ranks[m], before_event ? std::min<int64_t>(rank + 2, 4) : rank);
      ASSERT_FALSE(trace(run.adapters.A[m], 0, rank)) << step;
      if (before_event) continue;
      ASSERT_FALSE(trace(run.adapters.B[m], 1, rank)) << step;
      const auto& state = static_cast<torch::optim::AdamWParamState&>(
          *optimizer.state().at(run.adapters.A[m].unsafeGetTensorImpl()));
      ASSERT_FALSE(trace(state.exp_avg(), 0, rank)) << step;
      ASSERT_FALSE(trace(state.exp_avg_sq(), 0, rank)) << step;
    }
    if (before_event) {
      const at::Tensor with = run.forward();
      std::vector<int64_t> ranks = ranks_of(allocator);
      std::swap(ranks, run.adapters.ranks);
      ASSERT_TRUE(run.forward().equal(with)) << step;
      std::swap(ranks, run.adapters.ranks);
    }
  }
  EXPECT_EQ(allocator.history().size(), 9);
}

TEST(SpectralProbes, WaitForFiniteGradientsAndGoWithTheAllocator) {
  Adapters adapters({{20, 14, 3, 7}});
  const at::Tensor G = torch::randn({14, 20}, torch::kDouble);
  SpectralAllocator allocator(adapters.list(), probing(4));
  adapters.set_gradients(0, G);
  allocator.step();
  adapters.set_gradients(0, G * std::numeric_limits<double>::infinity());
  allocator.step();
  EXPECT_EQ(allocator.skipped_steps(), 1);
  EXPECT_THAT(adapters.ranks, ElementsAre(7));
  adapters.set_gradients(0, G);
  allocator.step();
  EXPECT_EQ(allocator.history().size(), 1);
  allocator.step();
  EXPECT_THAT(adapters.ranks, ElementsAre(7));
  allocator.detach();
  EXPECT_THAT(adapters.ranks, ElementsAre(3));
  EXPECT_FALSE(adapters.B[0].detach().narrow(1, 3, 4).any().item<bool>());
}

TEST(SpectralProbes, AreNeededForGrowthByTheGradient) {
  Adapters adapters({{20, 14, 3, 7}});
  EXPECT_THAT(error_of([&] {
                SpectralAllocator allocator(adapters.list(),
                                            probing(0).exchange({.growth = GrowthOrder::gradient}));
              }),
              HasSubstr("probes must be at least 1 for growth by the gradient, got 0"));
  EXPECT_THAT(error_of([&] { SpectralAllocator allocator(adapters.list(), probing(-1)); }),
              HasSubstr("probes must be at least 0, got -1"));
}

}  // namespace
}  // namespace rankwise
