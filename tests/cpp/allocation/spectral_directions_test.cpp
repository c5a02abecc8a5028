// What SpectralAllocator does with directions at an event: gradients follow them, and new ones are
// young for as long as the options say.
#include "spectral_adapters.h"

namespace rankwise {
namespace {

using testing::ElementsAre;

// The gradients of the new factors are those that a loss with the same gradient of the update has.
TEST(SpectralAllocator, GradientsFollowTheirFactors) {
  Adapters adapters({{7, 6, 3, 4}});
  const at::Tensor G = torch::randn({6, 7}, torch::kDouble);
  adapters.set_gradients(0, G);
  SpectralAllocator allocator(adapters.list(),
                              options().rule([](const auto&) { return std::vector<int64_t>{2}; }));
  allocator.step();
  ASSERT_THAT(ranks_of(allocator), ElementsAre(2));
  const at::Tensor A = adapters.A[0].detach(), B = adapters.B[0].detach();
  EXPECT_TRUE(adapters.A[0].grad().allclose(B.t().matmul(G), 1e-10, 1e-10));
  EXPECT_TRUE(adapters.B[0].grad().allclose(G.matmul(A.t()), 1e-10, 1e-10));
  EXPECT_TRUE(adapters.A[0].grad().narrow(0, 0, 2).any().item<bool>());
}

TEST(SpectralAllocator, DirectionsAreYoungUntilTheirAge) {
  Adapters adapters({{6, 6, 2, 3}});
  std::vector<int64_t> young;
  SpectralAllocator allocator(
      adapters.list(),
      options().min_age(2).budget_at([](int64_t) { return 1000; }).rule([&](const auto& question) {
        young.push_back(question.young[0]);
        return std::vector<int64_t>{3};
      }));
  for (int event = 0; event < 4; ++event) {
    adapters.set_gradients(0, torch::randn({6, 6}, torch::kDouble));
    allocator.step();
  }
  EXPECT_THAT(young, ElementsAre(0, 1, 0, 0));  // added at the first event
}

}  // namespace
}  // namespace rankwise
