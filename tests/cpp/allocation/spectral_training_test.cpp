// SpectralAllocator from C++ between optimizer steps, and resuming.
#include <sstream>

#include "spectral_adapters.h"

namespace rankwise {
namespace {

using testing::ElementsAre;
using testing::Pair;

template <class Optimizer, class Settings>
void trains(const Settings& settings) {
  Train run;
  WithCallbacks<Optimizer> optimizer(run.parameters(), settings);
  const auto to_and_fro = [](const RankQuestion& question) {
    return question.step % 10 == 0 ? std::vector<int64_t>{2, 4} : std::vector<int64_t>{3, 3};
  };
  SpectralAllocator allocator(run.adapters.list(), schedule().ramp_steps(3).rule(to_and_fro));
  allocator.attach(optimizer);
  double first = 0, last = 0;
  for (int i = 0; i < 60; ++i) last = i == 0 ? first = run.step(optimizer) : run.step(optimizer);
  EXPECT_LT(last, 0.9 * first);
  EXPECT_EQ(allocator.steps(), 60);
  EXPECT_TRUE(allocator.frozen());
  for (const SpectralEvent& event : allocator.history()) EXPECT_EQ(event.added, 1);
}

TEST(SpectralAllocator, TrainsWithTorchsOptimizers) {
  trains<torch::optim::AdamW>(torch::optim::AdamWOptions(1e-2));
  trains<torch::optim::Adam>(torch::optim::AdamOptions(1e-2).amsgrad(true));
  trains<torch::optim::SGD>(torch::optim::SGDOptions(1e-2).momentum(0.9));
  trains<torch::optim::RMSprop>(torch::optim::RMSpropOptions(1e-3).centered(true));
  trains<torch::optim::Adagrad>(torch::optim::AdagradOptions(1e-1));
}

TEST(SpectralAllocator, GrowthChangesNoOutput) {
  Train run;
  WithCallbacks<torch::optim::AdamW> optimizer(run.parameters(), torch::optim::AdamWOptions(1e-2));
  SpectralAllocator allocator(run.adapters.list(),
                              schedule().initial_budget(400).rule([](const auto& question) {
                                std::vector<int64_t> ranks = question.ranks();
                                for (int64_t& rank : ranks) rank = std::min<int64_t>(rank + 1, 5);
                                return ranks;
                              }));
  for (int i = 0; i < 20; ++i) {
    run.step(optimizer);
    const at::Tensor before = run.forward();
    allocator.step();
    EXPECT_TRUE(run.forward().equal(before)) << i;
  }
  EXPECT_THAT(allocator.ranks(), ElementsAre(Pair("m0", 5), Pair("m1", 5)));
}

void resumes_to_the_bit(const SpectralOptions& chosen) {
  for (const int stop : {1, 4, 5, 9, 10, 11, 13, 20, 34, 49, 50, 55}) {
    Train whole;
    WithCallbacks<torch::optim::AdamW> optimizer(whole.parameters(),
                                                 torch::optim::AdamWOptions(1e-2));
    SpectralAllocator allocator(whole.adapters.list(), chosen);
    allocator.attach(optimizer);
    std::stringstream saved, moments;
    std::vector<at::Tensor> factors;
    for (int i = 0; i < 60; ++i) {
      if (i == stop) {
        torch::save(allocator, saved);
        torch::save(static_cast<torch::optim::Optimizer&>(optimizer), moments);
        for (const at::Tensor& p : whole.parameters()) factors.push_back(p.detach().clone());
      }
      whole.step(optimizer);
    }

    Train again;
    WithCallbacks<torch::optim::AdamW> other(again.parameters(), torch::optim::AdamWOptions(1e-2));
    SpectralAllocator resumed(again.adapters.list(), chosen);
    torch::load(resumed, saved);
    torch::load(static_cast<torch::optim::Optimizer&>(other), moments);
    for (size_t i = 0; i < factors.size(); ++i) again.parameters()[i].detach().copy_(factors[i]);
    resumed.attach(other);
    for (int i = stop; i < 60; ++i) again.step(other);
    EXPECT_EQ(resumed.ranks(), allocator.ranks());
    EXPECT_EQ(resumed.history().size(), allocator.history().size());
    for (size_t i = 0; i < factors.size(); ++i)
      EXPECT_TRUE(again.parameters()[i].equal(whole.parameters()[i])) << stop << " " << i;
  }
}

TEST(SpectralAllocator, ResumesToTheBit) {
  resumes_to_the_bit(schedule().ramp_steps(4));
  resumes_to_the_bit(schedule().probes(2));
}

}  // namespace
}  // namespace rankwise
