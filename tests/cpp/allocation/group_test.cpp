// Allocators in a group of processes, which are threads here: they agree, or all of them throw.
#include <array>
#include <barrier>
#include <thread>
#include <utility>

#include "allocation/group_decision.h"
#include "rank_allocator_net.h"

namespace rankwise {
namespace {

using testing::Each;
using testing::HasSubstr;

constexpr size_t count = 3;

// Gathers among `count` threads, and counts how often.
class Threads {
 public:
  AllGather of(size_t rank) {
    return [this, rank](const at::Tensor& mine) {
      tensors_[rank] = mine;
      barrier_.arrive_and_wait();
      const std::vector<at::Tensor> all(tensors_.begin(), tensors_.end());
      gatherings_[rank] += 1;
      barrier_.arrive_and_wait();
      return all;
    };
  }

  // What each thread threw, "" for nothing.
  std::vector<std::string> run(const std::function<void(size_t rank)>& action) {
    std::vector<std::string> errors(count);
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < count; ++rank) {
      threads.emplace_back([&, rank] {
        try {
          action(rank);
        } catch (const std::exception& error) {
          errors[rank] = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    return errors;
  }

  int gatherings() const { return gatherings_[0]; }

 private:
  std::barrier<> barrier_{count};
  std::array<at::Tensor, count> tensors_;
  std::array<int, count> gatherings_ = {};
};

// The same training in each thread.
struct Group {
  Threads threads;
  std::array<Net, count> nets;
  std::vector<std::unique_ptr<RankAllocator>> allocators;
  int64_t calls = 0;

  explicit Group(const AdaLoRAOptions& chosen) {
    for (size_t rank = 0; rank < count; ++rank) {
      allocators.push_back(std::make_unique<RankAllocator>(nets[rank].adapters(), chosen));
      allocators.back()->set_group(threads.of(rank));
    }
  }

  void set_gradients(const std::function<void(size_t rank, Net& net)>& change = {}) {
    for (size_t rank = 0; rank < count; ++rank) {
      torch::manual_seed(50 + calls);
      for (const at::Tensor& factor : nets[rank].parameters)
        factor.mutable_grad() = torch::randn_like(factor);
      if (change) change(rank, nets[rank]);
    }
    ++calls;
  }

  std::vector<std::string> step(const std::function<void(size_t rank, Net& net)>& change = {}) {
    set_gradients(change);
    return threads.run([&](size_t rank) { allocators[rank]->step(); });
  }

  // All that must stay as it is where a step throws.
  std::vector<std::map<std::string, at::Tensor>> state() const {
    std::vector<std::map<std::string, at::Tensor>> states;
    for (size_t rank = 0; rank < count; ++rank) {
      states.push_back(allocators[rank]->state());
      for (size_t i = 0; i < nets[rank].parameters.size(); ++i)
        states.back()["parameter " + std::to_string(i)] = nets[rank].parameters[i].detach().clone();
    }
    return states;
  }
};

void expect_same(const std::vector<std::map<std::string, at::Tensor>>& before,
                 const std::vector<std::map<std::string, at::Tensor>>& after) {
  for (size_t rank = 0; rank < count; ++rank)
    for (const auto& [name, value] : before[rank])
      EXPECT_TRUE(at::equal(value, after[rank].at(name))) << rank << " " << name;
}

AdaLoRAOptions every_third() {
  return options().allocation_interval(3);  // at 3, 6 and, the last, at 8
}

TEST(Group, MeetsAtTheFirstStepAndAtAllocations) {
  Group group(every_third());
  std::vector<int> gatherings;
  for (int step = 0; step < 12; ++step) {
    EXPECT_THAT(group.step(), Each(""));
    gatherings.push_back(group.threads.gatherings());
  }
  EXPECT_THAT(gatherings, testing::ElementsAre(1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4, 4));
  EXPECT_TRUE(group.allocators[0]->frozen());
  for (const auto& allocator : group.allocators)
    EXPECT_EQ(allocator->ranks(), group.allocators[0]->ranks());
}

TEST(Group, ADifferenceIsNamedAndNothingIsChanged) {
  Group group(every_third());
  for (int step = 0; step < 5; ++step) group.step();
  const auto before = group.state();
  const auto errors = group.step([](size_t rank, Net& net) {
    if (rank == 1) net.parameters[4].grad()[2][1] *= 1.001;
  });
  EXPECT_THAT(errors, Each(HasSubstr("do not decide alike at step 6: process 1 differs, first in "
                                     "'second'. Nothing was changed")));
  expect_same(before, group.state());
  group.calls -= 1;
  EXPECT_THAT(group.step(), Each(""));  // with the same gradients everywhere
  EXPECT_EQ(group.allocators[1]->steps(), 6);
}

TEST(Group, ADifferenceBetweenAllocationsIsFoundAtTheNext) {
  Group group(every_third());
  for (int step = 0; step < 3; ++step) group.step();
  EXPECT_THAT(group.step([](size_t rank, Net& net) {
    if (rank == 2) net.parameters[0].grad()[0][0] += 1e-9;
  }),
              Each(""));
  EXPECT_THAT(group.step(), Each(""));
  EXPECT_THAT(group.step(), Each(HasSubstr("step 6: process 2 differs, first in 'first'")));
}

TEST(Group, StepsSkippedByAllShiftTheMeetings) {
  Group group(every_third());
  const auto bad = [](size_t, Net& net) { net.parameters[1].grad()[0][0] = NAN; };
  for (int call = 0; call < 16; ++call)
    EXPECT_THAT(group.step(call % 4 == 1 ? bad : std::function<void(size_t, Net&)>()), Each(""));
  EXPECT_EQ(group.allocators[0]->skipped_steps(), 3);  // the fourth is after the last choice
  EXPECT_TRUE(group.allocators[0]->frozen());
  for (const auto& allocator : group.allocators)
    EXPECT_EQ(allocator->ranks(), group.allocators[0]->ranks());
}

TEST(Group, AStepSkippedByOneIsReportedByAll) {
  for (const int skipped : {0, 1, 2, 3, 4}) {
    Group group(every_third());
    std::vector<std::string> errors(count);
    for (int call = 0; errors[0].empty() && call < 6; ++call) {
      errors = group.step([&](size_t rank, Net& net) {
        if (call == skipped && rank == 0) net.parameters[1].grad()[0][0] = NAN;
      });
    }
    EXPECT_THAT(errors, Each(HasSubstr("skipped for gradients that are infinite or NaN, differ")));
    EXPECT_THAT(errors[0], HasSubstr(" and 1, process 1: "));
  }
}

TEST(Group, AnErrorOfOneEndsTheStepOfAll) {
  Group group(every_third());
  group.step();
  group.step();
  const auto before = group.state();
  const auto errors = group.step([](size_t rank, Net& net) {
    if (rank == 1)
      for (const at::Tensor& factor : net.parameters) factor.mutable_grad().reset();
  });
  EXPECT_THAT(errors[1], HasSubstr("no adapter has a gradient"));
  EXPECT_THAT(errors[0], HasSubstr("process 1 could not take it"));
  EXPECT_THAT(errors[2], HasSubstr("process 1 could not take it"));
  expect_same(before, group.state());
}

TEST(Group, OptionsAndAdaptersMustBeTheSame) {
  Threads threads;
  std::array<Net, count> nets;
  const auto errors = threads.run([&](size_t rank) {
    RankAllocator allocator(nets[rank].adapters(), options().beta1(rank == 0 ? 0.8 : 0.85));
    for (const at::Tensor& factor : nets[rank].parameters)
      factor.mutable_grad() = at::ones_like(factor);
    allocator.set_group(threads.of(rank));
    allocator.step();
  });
  EXPECT_THAT(errors, Each(HasSubstr("step 1: process 0 has other options")));
}

TEST(Group, FreezesTogetherOrNotAtAll) {
  Group group(every_third());
  group.step();
  group.step();
  const auto before = group.state();
  group.set_gradients();
  const auto errors = group.threads.run([&](size_t rank) {
    if (rank == 2) {
      group.allocators[rank]->freeze();
    } else {
      group.allocators[rank]->step();
    }
  });
  EXPECT_THAT(errors, Each(HasSubstr("steps taken, and skipped")));
  expect_same(before, group.state());
  EXPECT_THAT(group.threads.run([&](size_t rank) { group.allocators[rank]->freeze(); }), Each(""));
  EXPECT_TRUE(group.allocators[2]->frozen());
  const int gatherings = group.threads.gatherings();
  EXPECT_THAT(group.step(), Each(""));
  EXPECT_EQ(group.threads.gatherings(), gatherings);
}

TEST(Group, ALoadedStateIsComparedAtTheNextStep) {
  Group group(every_third());
  for (int step = 0; step < 4; ++step) group.step();
  const auto state = group.allocators[0]->state();
  for (int step = 0; step < 3; ++step) group.step();
  for (const size_t rank : {0, 1}) group.allocators[rank]->load_state(state);
  // The third is not asked again before its next allocation, of its call 8.
  EXPECT_THAT(group.step(),
              Each(HasSubstr("process 0: 5 and 0, process 1: 5 and 0, process 2: 8")));
}

TEST(Group, SaysWhatDiffers) {
  Standing one{.steps = 3, .budget = 7}, other = one;
  const auto differs = [&] { return difference({one, other, one}); };
  EXPECT_EQ(differs(), "");
  other.budget = 6;
  EXPECT_EQ(differs(), "process 1 has another budget");
  other.freezes = 1;
  EXPECT_EQ(differs(), "freeze() was called by process 1 alone");
  std::swap(one, other);
  EXPECT_EQ(differs(), "freeze() was called by process 0, 2 alone");
}

TEST(Group, WithoutOneNothingIsGathered) {
  Group group(every_third());
  group.step();
  for (const auto& allocator : group.allocators) allocator->set_group({});
  for (int step = 0; step < 8; ++step)
    EXPECT_THAT(group.step([](size_t rank, Net& net) {
      net.parameters[0].mutable_grad().mul_(1.0 + rank);
    }),
                Each(""));
  EXPECT_EQ(group.threads.gatherings(), 1);
}

TEST(Group, WhatIsGatheredMustBeWhatWasSent) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  for (const at::Tensor& factor : net.parameters) factor.mutable_grad() = at::ones_like(factor);
  allocator.set_group([](const at::Tensor& mine) {
    return std::vector<at::Tensor>{mine, mine.to(at::kFloat)};
  });
  try {
    allocator.step();
    FAIL();
  } catch (const c10::Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("all_gather must return int64 tensors of 7 elements"));
  }
  EXPECT_EQ(allocator.steps(), 0);
}

}  // namespace
}  // namespace rankwise
