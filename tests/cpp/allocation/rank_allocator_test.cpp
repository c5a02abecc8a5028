// RankAllocator and WithCallbacks from C++: a training that prunes, shrinks, stops and resumes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

namespace {

using rankwise::AdaLoRAOptions;
using rankwise::RankAllocator;
template <class Optimizer>
using WithCallbacks = rankwise::optim::WithCallbacks<Optimizer>;

AdaLoRAOptions options() {
  return AdaLoRAOptions()
      .initial_rank(4)
      .target_rank(2)
      .total_steps(12)
      .warmup_steps(2)
      .final_steps(4);
}

// Two adapted layers in float64, one after the other, with the ranks the allocator told them.
struct Net {
  std::vector<at::Tensor> weights, parameters;
  std::vector<int64_t> ranks = {4, 4};

  Net() {
    torch::manual_seed(0);
    for (const auto& [in, out] : {std::pair(7, 9), std::pair(9, 3)}) {
      weights.push_back(torch::randn({out, in}, torch::kDouble));
      for (const at::Tensor& factor :
           {torch::randn({4, in}, torch::kDouble), torch::randn({out, 4}, torch::kDouble),
            torch::randn({4, 1}, torch::kDouble)})
        parameters.push_back((0.3 * factor).requires_grad_());
    }
  }

  std::vector<rankwise::Adapter> adapters() {
    std::vector<rankwise::Adapter> result;
    for (size_t m = 0; m < 2; ++m) {
      result.push_back({m == 0 ? "first" : "second", parameters[3 * m], parameters[3 * m + 1],
                        parameters[3 * m + 2], ranks[m],
                        [this, m](int64_t rank) { ranks[m] = rank; }});
    }
    return result;
  }

  at::Tensor forward(at::Tensor x) const {
    for (size_t m = 0; m < 2; ++m) {
      const at::Tensor* p = &parameters[3 * m];
      x = rankwise::lora_linear(m == 0 ? x : x.tanh(), weights[m], {}, p[0], p[1], p[2], 2.0, 0.0,
                                ranks[m]);
    }
    return x;
  }
};

template <class Optimizer>
double train_step(Net& net, Optimizer& optimizer, RankAllocator& allocator, int64_t i) {
  torch::manual_seed(100 + i);
  const at::Tensor x = torch::randn({16, 7}, torch::kDouble);
  optimizer.zero_grad();
  const at::Tensor loss = net.forward(x).square().mean() + 0.1 * allocator.orthogonality_penalty();
  loss.backward();
  optimizer.step();
  return loss.template item<double>();
}

using AdamW = WithCallbacks<torch::optim::AdamW>;

TEST(RankAllocator, PrunesShrinksAndTellsTheRanks) {
  Net net;
  AdamW optimizer(net.parameters, torch::optim::AdamWOptions(1e-2));
  RankAllocator allocator(net.adapters(), options());
  allocator.attach(optimizer);
  const void* const data = net.parameters[0].data_ptr();
  for (int64_t i = 0; i < 12; ++i) {
    train_step(net, optimizer, allocator, i);
    EXPECT_EQ(allocator.frozen(), i >= 7) << i;
  }
  const auto ranks = allocator.ranks();
  EXPECT_EQ(ranks[0].first, "first");
  EXPECT_EQ(ranks[0].second + ranks[1].second, 4);
  EXPECT_THAT(net.ranks, testing::ElementsAre(ranks[0].second, ranks[1].second));
  EXPECT_EQ(net.parameters[0].data_ptr(), data);
  for (size_t i = 0; i < 6; ++i) {
    const int64_t dim = i % 3 == 1, rank = net.ranks[i / 3];
    EXPECT_EQ(net.parameters[i].narrow(dim, rank, 4 - rank).abs().sum().item<double>(), 0) << i;
  }
  EXPECT_EQ(allocator.history().back().step, 8);
  EXPECT_EQ(allocator.history().back().budget, 4);
}

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

TEST(RankAllocator, ShrinkingKeepsTheFunction) {
  Net net;
  WithCallbacks<torch::optim::SGD> optimizer(net.parameters,
                                             torch::optim::SGDOptions(1e-2).momentum(0.9));
  RankAllocator allocator(net.adapters(), options());
  for (int64_t i = 0; i < 7; ++i) {
    train_step(net, optimizer, allocator, i);
    allocator.step();
  }
  train_step(net, optimizer, allocator, 7);
  const at::Tensor x = torch::randn({5, 7}, torch::kDouble);
  allocator.freeze();
  const at::Tensor shrunk = net.forward(x);
  net.ranks = {4, 4};  // the zeros behind the kept directions add nothing
  EXPECT_LT((net.forward(x) - shrunk).abs().max().item<double>(), 1e-12);
}

TEST(RankAllocator, ResumesWithTheSameBits) {
  for (const int64_t stop : {1, 2, 3, 7, 8, 9, 11}) {
    Net whole, half, resumed;
    std::vector<double> losses, again;
    AdamW optimizer(whole.parameters, torch::optim::AdamWOptions(1e-2));
    RankAllocator allocator(whole.adapters(), options());
    allocator.attach(optimizer);
    for (int64_t i = 0; i < 12; ++i) losses.push_back(train_step(whole, optimizer, allocator, i));

    AdamW first(half.parameters, torch::optim::AdamWOptions(1e-2));
    RankAllocator before(half.adapters(), options());
    before.attach(first);
    for (int64_t i = 0; i < stop; ++i) again.push_back(train_step(half, first, before, i));
    std::stringstream saved;
    torch::serialize::OutputArchive archive;
    first.save(archive);
    archive.save_to(saved);

    {
      const torch::NoGradGuard no_grad;
      for (size_t i = 0; i < 6; ++i) resumed.parameters[i].copy_(half.parameters[i]);
    }
    AdamW second(resumed.parameters, torch::optim::AdamWOptions(1e-2));
    torch::serialize::InputArchive loaded;
    loaded.load_from(saved);
    second.load(loaded);
    RankAllocator after(resumed.adapters(), options());
    std::stringstream allocation;
    torch::save(before, allocation);
    torch::load(after, allocation);
    after.attach(second);
    EXPECT_THAT(resumed.ranks, testing::ElementsAreArray(half.ranks));
    for (int64_t i = stop; i < 12; ++i) again.push_back(train_step(resumed, second, after, i));
    EXPECT_EQ(losses, again) << "stopped after " << stop;
    for (size_t i = 0; i < 6; ++i)
      EXPECT_TRUE(whole.parameters[i].equal(resumed.parameters[i])) << i;
  }
}

TEST(RankAllocator, SkipsWhatIsNotFinite) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  AdamW optimizer(net.parameters, torch::optim::AdamWOptions(1e-2));
  train_step(net, optimizer, allocator, 0);
  allocator.step();
  const auto before = allocator.state();
  net.parameters[4].mutable_grad()[2][1] = std::numeric_limits<double>::infinity();
  allocator.step();
  allocator.step({.state_of = {}, .found_inf = torch::ones({})});
  EXPECT_EQ(allocator.skipped_steps(), 2);
  EXPECT_EQ(allocator.steps(), 1);
  for (const auto& [name, tensor] : allocator.state()) {
    EXPECT_EQ(tensor.equal(before.at(name)), name != "skipped_steps") << name;
  }
}

TEST(RankAllocator, SaysWhereToAttachWhenGradientsAreGone) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  EXPECT_THAT([&] { allocator.step(); }, testing::ThrowsMessage<c10::Error>(
                                             testing::HasSubstr("allocator.attach(optimizer)")));
}

TEST(RankAllocator, RefusesFactorsWithoutMemory) {
  for (const auto& [other, kind] : {std::pair(torch::ones({9, 4}).to(torch::kMeta), "meta"),
                                    std::pair(torch::ones({9, 4}).to_sparse(), "Sparse")}) {
    Net net;
    net.parameters[1] = other;
    EXPECT_THAT([&] { RankAllocator(net.adapters(), options()); },
                testing::ThrowsMessage<std::invalid_argument>(testing::HasSubstr(
                    std::string("lora_B of 'first' must be dense, with data, got ") + kind)));
  }
}

TEST(RankAllocator, RefusesToStepWithoutMemoryAndChangesNothing) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  const auto before = allocator.state();
  const auto refuses = [&](const std::string& what) {
    const auto message = testing::ThrowsMessage<std::invalid_argument>(testing::HasSubstr(what));
    EXPECT_THAT([&] { allocator.step(); }, message);
    EXPECT_THAT([&] { allocator.freeze(); }, message);
    for (const auto& [name, tensor] : allocator.state()) EXPECT_TRUE(tensor.equal(before.at(name)));
  };
  for (at::Tensor& parameter : net.parameters) parameter.mutable_grad() = parameter.detach();
  net.parameters[0].mutable_grad() = net.parameters[0].detach().to_sparse();
  refuses("the gradient of lora_A of 'first' must be dense, with data, got Sparse");
  net.parameters[0].mutable_grad().reset();
  net.parameters[3].storage().unsafeGetStorageImpl()->set_data_ptr_noswap(at::DataPtr());
  refuses("lora_A of 'second' must be dense, with data, got freed memory");
}

TEST(RankAllocator, RefusesAStateWithoutMemory) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  auto state = allocator.state();
  for (const char* name : {"frozen", "history.steps", "first.kept", "options.beta1"})
    state[name] = state[name].to(torch::kMeta);
  for (const char* name : {"frozen", "history.steps", "first.kept", "options.beta1"})
    EXPECT_THAT([&] { allocator.load_state(state); },
                testing::ThrowsMessage<std::invalid_argument>(testing::HasSubstr(
                    std::string(name) + ": must be dense, with data, got meta")));
}

TEST(RankAllocator, RefusesAStateOfOtherOptionsAndChangesNothing) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  const RankAllocator other(net.adapters(), options().total_steps(13));
  EXPECT_THAT([&] { allocator.load_state(other.state()); },
              testing::ThrowsMessage<std::invalid_argument>(
                  testing::HasSubstr("options.total_steps: must be 12, got 13")));
  EXPECT_EQ(allocator.steps(), 0);
}

TEST(RankAllocator, RefusesAnArchiveOfSomethingElse) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  std::stringstream stream;
  torch::save(torch::ones({2}), stream);
  EXPECT_THAT([&] { torch::load(allocator, stream); },
              testing::ThrowsMessage<c10::Error>(
                  testing::HasSubstr("RankAllocator: the archive holds no allocator")));
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
