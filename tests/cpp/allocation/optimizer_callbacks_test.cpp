// What runs after the optimizer's step: allocators under WithCallbacks, and on_step.
#include "rank_allocator_net.h"

namespace rankwise {
namespace {

TEST(RankAllocator, CallsBackAfterEachStepWithWhatItLeft) {
  Net net;
  AdamW optimizer(net.parameters, torch::optim::AdamWOptions(1e-2));
  RankAllocator allocator(net.adapters(), options());
  allocator.attach(optimizer);
  std::vector<int64_t> steps, budgets, kept, second;
  allocator.on_step([&](const rankwise::Allocator& now) {
    steps.push_back(now.steps() + now.skipped_steps());
    budgets.push_back(now.budget());
    kept.push_back(now.ranks()[0].second + now.ranks()[1].second);
    EXPECT_EQ(now.frozen(), now.steps() >= 8);
  });
  allocator.on_step([&](const rankwise::Allocator&) { second.push_back(steps.size()); });
  for (int64_t i = 0; i < 9; ++i) train_step(net, optimizer, allocator, i);
  EXPECT_THAT(steps, testing::ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9));
  EXPECT_EQ(second, steps);
  EXPECT_EQ(budgets, kept);  // it allocates in each step after warm-up
  EXPECT_EQ(budgets.front(), 8);
  EXPECT_EQ(budgets.back(), 4);
}

TEST(RankAllocator, CallsBackAfterSkippedStepsAndAfterFreezing) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  std::vector<std::pair<int64_t, int64_t>> seen;
  allocator.on_step([&](const rankwise::Allocator& now) {
    seen.emplace_back(now.skipped_steps(), now.budget());
  });
  net.forward(torch::randn({4, 7}, torch::kDouble)).sum().backward();
  net.parameters[0].mutable_grad()[0][0] = std::numeric_limits<double>::infinity();
  allocator.step();
  allocator.freeze();
  EXPECT_THAT(seen, testing::ElementsAre(testing::Pair(1, 8), testing::Pair(1, 4)));
}

TEST(RankAllocator, AnExceptionOfACallbackLeavesTheStepTaken) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  allocator.on_step([](const rankwise::Allocator&) { throw std::runtime_error("full disk"); });
  net.forward(torch::randn({4, 7}, torch::kDouble)).sum().backward();
  EXPECT_THROW(allocator.step(), std::runtime_error);
  EXPECT_EQ(allocator.steps(), 1);
}

TEST(WithCallbacks, AClosureIsEvaluatedOnceAndItsLossReturned) {
  Net net, plain;
  AdamW optimizer(net.parameters, torch::optim::AdamWOptions(1e-2));
  torch::optim::AdamW reference(plain.parameters, torch::optim::AdamWOptions(1e-2));
  std::vector<const char*> order;
  const auto handle =
      optimizer.add_callback([&](const rankwise::OptimizerView&) { order.push_back("callback"); });
  const at::Tensor x = torch::ones({3, 7}, torch::kDouble);
  for (int i = 0; i < 3; ++i) {
    const at::Tensor loss = optimizer.step([&] {
      order.push_back("closure");
      optimizer.zero_grad();
      const at::Tensor value = net.forward(x).square().mean();
      value.backward();
      return value;
    });
    reference.zero_grad();
    const at::Tensor wanted = plain.forward(x).square().mean();
    wanted.backward();
    reference.step();
    EXPECT_TRUE(loss.equal(wanted));
  }
  EXPECT_THAT(order, testing::ElementsAre("closure", "callback", "closure", "callback", "closure",
                                          "callback"));
  for (size_t i = 0; i < 6; ++i) EXPECT_TRUE(net.parameters[i].equal(plain.parameters[i])) << i;
}

// State that is elsewhere cannot follow the directions: masking takes the place of shrinking.
template <class Optimizer>
void expect_masked(Net& net, Optimizer& optimizer) {
  RankAllocator allocator(net.adapters(), options());
  allocator.attach(optimizer);
  const at::Tensor x = torch::ones({3, 7}, torch::kDouble);
  const auto closure = [&] {
    for (at::Tensor& parameter : net.parameters) parameter.mutable_grad().reset();
    const at::Tensor loss = net.forward(x).square().mean();
    loss.backward();
    return loss;
  };
  for (int i = 0; i < 12; ++i) optimizer.step(closure);
  EXPECT_TRUE(allocator.frozen());
  EXPECT_THAT(net.ranks, testing::ElementsAre(4, 4));
  int64_t zeros = 0;
  for (const size_t e : {2, 5}) zeros += (net.parameters[e] == 0).sum().template item<int64_t>();
  EXPECT_EQ(zeros, 4);
}

TEST(WithCallbacks, StateUnderAnotherParameterIsNotMoved) {
  Net net;
  WithCallbacks<torch::optim::LBFGS> optimizer(net.parameters,
                                               torch::optim::LBFGSOptions(1e-3).max_iter(2));
  expect_masked(net, optimizer);
}

TEST(WithCallbacks, StateInAnotherOptimizerIsNotMoved) {
  Net net;
  AdamW optimizer({net.parameters[0], net.parameters[1]}, torch::optim::AdamWOptions(1e-2));
  expect_masked(net, optimizer);
}

TEST(WithCallbacks, HandlesDetachAndOutliveTheirOptimizer) {
  Net net;
  auto optimizer = std::make_unique<AdamW>(net.parameters, torch::optim::AdamWOptions(1e-2));
  int calls = 0;
  auto handle = optimizer->add_callback([&](const rankwise::OptimizerView&) { ++calls; });
  optimizer->step();
  handle.remove();
  optimizer->step();
  EXPECT_EQ(calls, 1);
  auto late = optimizer->add_callback([&](const rankwise::OptimizerView&) { ++calls; });
  {
    RankAllocator allocator(net.adapters(), options());
    allocator.attach(*optimizer);
  }
  optimizer->step();  // the allocator is gone: its callback does nothing
  EXPECT_EQ(calls, 2);
  optimizer.reset();
  late.remove();
}

TEST(WithCallbacks, StateOfEachOptimizerCanMove) {
  const auto count = [](auto optimizer, size_t expected) {
    std::optional<std::vector<at::Tensor>> found;
    optimizer.add_callback([&](const rankwise::OptimizerView& view) {
      found = view.state_of(optimizer.param_groups()[0].params()[0]);
    });
    optimizer.param_groups()[0].params()[0].sum().backward();
    optimizer.step();
    ASSERT_TRUE(found.has_value());
    EXPECT_EQ(found->size(), expected);
  };
  namespace optim = torch::optim;
  const auto parameter = [] { return std::vector{torch::ones({2, 3}, torch::requires_grad())}; };
  count(WithCallbacks<optim::AdamW>(parameter(), optim::AdamWOptions(1e-2)), 2);
  count(WithCallbacks<optim::Adam>(parameter(), optim::AdamOptions(1e-2).amsgrad(true)), 3);
  count(WithCallbacks<optim::SGD>(parameter(), optim::SGDOptions(1e-2).momentum(0.9)), 1);
  count(WithCallbacks<optim::SGD>(parameter(), optim::SGDOptions(1e-2)), 0);
  count(WithCallbacks<optim::RMSprop>(parameter(), optim::RMSpropOptions(1e-2).momentum(0.9)), 2);
  count(WithCallbacks<optim::Adagrad>(parameter(), optim::AdagradOptions(1e-2)), 1);
}

}  // namespace
}  // namespace rankwise
