// SpectralAllocator in a group of processes, which are threads here.
#include <array>
#include <atomic>
#include <barrier>
#include <thread>

#include "spectral_adapters.h"

namespace rankwise {
namespace {

using testing::HasSubstr;

// The same training in two threads, of which the second may be disturbed.
struct Pair {
  std::array<Train, 2> trainings;
  std::array<std::unique_ptr<SpectralAllocator>, 2> allocators;
  std::array<at::Tensor, 2> sent;
  std::barrier<> barrier{2};
  std::array<int, 2> gatherings = {};
  std::array<std::map<std::string, at::Tensor>, 2> before;  // the allocators' last step

  explicit Pair(const SpectralOptions& chosen) {
    for (const size_t rank : {0, 1}) {
      allocators[rank] =
          std::make_unique<SpectralAllocator>(trainings[rank].adapters.list(), chosen);
      allocators[rank]->set_group([this, rank](const at::Tensor& mine) {
        sent[rank] = mine;
        barrier.arrive_and_wait();
        const std::vector<at::Tensor> all(sent.begin(), sent.end());
        ++gatherings[rank];
        barrier.arrive_and_wait();
        return all;
      });
    }
  }

  std::array<std::string, 2> step(const std::function<void(Adapters&)>& disturb = {}) {
    std::array<std::string, 2> errors;
    std::array<std::thread, 2> threads;
    for (const size_t rank : {0, 1}) {
      Train& training = trainings[rank];
      for (const at::Tensor& parameter : training.parameters()) parameter.mutable_grad().reset();
      (training.forward() - training.x.narrow(1, 0, 5).sin() * 3).square().mean().backward();
      if (rank == 1 && disturb) disturb(training.adapters);
      const at::NoGradGuard no_grad;
      for (const at::Tensor& parameter : training.parameters())
        parameter.sub_(parameter.grad(), 0.01);
      before[rank] = state(rank);
    }
    for (const size_t rank : {0, 1}) {
      threads[rank] =
          std::thread([&, rank] { errors[rank] = error_of([&] { allocators[rank]->step(); }); });
    }
    for (std::thread& thread : threads) thread.join();
    return errors;
  }

  std::map<std::string, at::Tensor> state(size_t rank) const {
    std::map<std::string, at::Tensor> state = allocators[rank]->state();
    const std::vector<at::Tensor> parameters = trainings[rank].parameters();
    for (size_t i = 0; i < parameters.size(); ++i)
      state["parameter " + std::to_string(i)] = parameters[i].detach().clone();
    return state;
  }
};

const std::array<std::string, 2> none = {"no error", "no error"};

TEST(SpectralGroup, MeetsAtTheFirstStepAndAtEvents) {
  Pair pair(schedule().ramp_steps(3).probes(1));
  for (int step = 0; step < 60; ++step) EXPECT_EQ(pair.step(), none);
  EXPECT_EQ(pair.gatherings[0], 1 + 9);
  EXPECT_EQ(ranks_of(*pair.allocators[0]), ranks_of(*pair.allocators[1]));
}

TEST(SpectralGroup, ADifferenceIsNamedAndNothingIsChanged) {
  Pair pair(schedule().ramp_steps(7).probes(1));
  for (int step = 0; step < 24; ++step) pair.step();
  const auto errors =
      pair.step([&](Adapters& adapters) { adapters.B[1].mutable_grad()[2][0] += 1e-6; });
  for (const std::string& error : errors)
    EXPECT_THAT(error, HasSubstr("at step 25: process 1 differs, first in 'm1'"));
  for (const size_t rank : {0, 1}) {
    EXPECT_EQ(pair.allocators[rank]->steps(), 24);
    for (const auto& [name, value] : pair.before[rank])
      EXPECT_TRUE(at::allclose(value, pair.state(rank).at(name), 0, 0, /*equal_nan=*/true)) << name;
  }
}

TEST(SpectralGroup, AStepSkippedByOneIsReportedByBoth) {
  Pair pair(schedule());
  for (int step = 0; step < 11; ++step) pair.step();
  EXPECT_EQ(pair.step([](Adapters& adapters) { adapters.A[0].mutable_grad()[0][0] = NAN; }), none);
  std::array<std::string, 2> errors = none;
  for (int step = 12; errors == none && step < 20; ++step) errors = pair.step();
  for (const std::string& error : errors)
    EXPECT_THAT(error, HasSubstr("process 0: 15 and 0, process 1: 11 and 4"));
}

TEST(SpectralGroup, ARulesErrorInOneEndsTheStepOfBoth) {
  SpectralOptions chosen = schedule();
  std::atomic<int> calls = 0;
  chosen.rule([&calls](const RankQuestion& question) {
    if (++calls == 2) throw std::runtime_error("of the rule");
    return question.ranks();
  });
  std::array<std::string, 2> errors;
  Pair pair(chosen);
  for (int step = 0; step < 10; ++step) errors = pair.step();
  const bool first = errors[0].find("of the rule") != std::string::npos;
  EXPECT_THAT(errors[first ? 0 : 1], HasSubstr("of the rule"));
  EXPECT_THAT(errors[first ? 1 : 0], HasSubstr("could not take it"));
}

}  // namespace
}  // namespace rankwise
