// RankAllocator from C++: a training that prunes, shrinks, stops and resumes.
#include "rank_allocator_net.h"

namespace rankwise {
namespace {

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

TEST(RankAllocator, AFreezeByHandIsInTheHistory) {
  Net net;
  AdamW optimizer(net.parameters, torch::optim::AdamWOptions(1e-2));
  RankAllocator allocator(net.adapters(), options());
  allocator.attach(optimizer);
  for (int64_t i = 0; i < 4; ++i) train_step(net, optimizer, allocator, i);
  const size_t before = allocator.history().size();
  ASSERT_GT(allocator.budget(), 4);
  allocator.freeze();
  ASSERT_EQ(allocator.history().size(), before + 1);
  EXPECT_EQ(allocator.history().back().budget, 4);
  EXPECT_EQ(allocator.history().back().ranks, net.ranks);
}

// More steps than there is room for at first.
TEST(RankAllocator, ALongTrainingHasItsWholeHistory) {
  Net net;
  RankAllocator allocator(net.adapters(),
                          options().total_steps(4000).allocation_interval(100).warmup_steps(50));
  constexpr int64_t steps = 2100;
  for (int64_t i = 0; i < steps; ++i) {
    for (const at::Tensor& parameter : net.parameters)
      parameter.mutable_grad() = at::full_like(parameter, 0.1 + static_cast<double>(i % 3));
    allocator.step();
  }
  EXPECT_EQ(allocator.steps(), steps);
  const auto history = allocator.history();
  ASSERT_EQ(history.size(), 4);  // 8 directions became 4
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(history[i].budget, 7 - static_cast<int64_t>(i)) << i;
  EXPECT_EQ(history.back().step, 1600);  // 4 (1 - (1600 - 50) / 3946)^3 is below 1 first
  EXPECT_EQ(history.back().budget, allocator.budget());
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

TEST(RankAllocator, MasksWhereTheOptimizersStateHasAnotherShape) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  const OptimizerView view{.state_of = [](const at::Tensor& parameter) {
    return std::vector<at::Tensor>{torch::ones({parameter.size(1)}, torch::kDouble)};
  }};
  for (at::Tensor& parameter : net.parameters) parameter.mutable_grad() = parameter.detach();
  allocator.step(view);
  const at::Tensor before = net.parameters[0].detach().clone();
  allocator.freeze(view);
  EXPECT_TRUE(allocator.frozen());
  EXPECT_THAT(net.ranks, testing::ElementsAre(4, 4));
  EXPECT_TRUE(net.parameters[0].equal(before));
}

TEST(RankAllocator, RefusesAdaptersThatDoNotFit) {
  const auto refused = [](const std::string& what, const auto& change) {
    Net net;
    std::vector<Adapter> adapters = net.adapters();
    change(adapters);
    EXPECT_THAT([&] { RankAllocator(adapters, options()); },
                testing::ThrowsMessage<std::invalid_argument>(testing::HasSubstr(what)));
  };
  refused("there must be at least one adapter", [](auto& all) { all.clear(); });
  refused("two adapters are called 'first'", [](auto& all) { all[1].name = "first"; });
  refused("got [4, 7], [9, 4] and none", [](auto& all) { all[0].lora_E = at::Tensor(); });
  refused("the factors of 'first' must be contiguous", [](auto& all) {
    all[0].lora_B = torch::ones({4, 9}).t();
  });
  refused("the directions of 'first' must be as many as its capacity 4, got 5",
          [](auto& all) { all[0].directions = std::make_shared<Directions>(5, 4); });
  refused("the rank of 'first' must be from 0 to its capacity 4, got 5",
          [](auto& all) { all[0].rank = 5; });
  refused("the adapters have rank 0: there is nothing to allocate", [](auto& all) {
    for (Adapter& adapter : all) adapter.rank = 0;
  });
}

// As after a training that kept none: their state is to be loaded.
TEST(RankAllocator, TakesAdaptersThatWerePrunedToNothing) {
  Net net;
  std::vector<Adapter> adapters = net.adapters();
  for (Adapter& adapter : adapters) {
    adapter.directions = std::make_shared<Directions>(4, 4);
    adapter.rank = 0;
  }
  EXPECT_EQ(RankAllocator(adapters, options()).steps(), 0);
}

TEST(RankAllocator, ReplacesFactorsByTheLikeAlone) {
  Net net;
  RankAllocator allocator(net.adapters(), options());
  const at::Tensor A = net.parameters[0], B = net.parameters[1], E = net.parameters[2];
  const auto refused = [&](const std::string& what, const std::string& name, const auto&... now) {
    EXPECT_THAT([&] { allocator.replace_factors(name, now...); },
                testing::ThrowsMessage<std::invalid_argument>(testing::HasSubstr(what)));
  };
  refused("it has no adapter 'third'", "third", A, B, E);
  refused("or have other shapes; make a new allocator", "first", A, B, at::Tensor());
  refused("or have other shapes; make a new allocator", "first", A.t(), B, E);
  allocator.replace_factors("first", A.detach().clone(), B, E);
}

TEST(Directions, RefuseWhatIsNoOrder) {
  Directions directions(3, 3);
  for (const auto& order :
       std::vector<std::vector<int64_t>>{{0, 1}, {0, 1, 1}, {0, 1, 3}, {-1, 0, 1}})
    EXPECT_THAT([&] { directions.set_order(order); },
                testing::ThrowsMessage<std::invalid_argument>(
                    testing::HasSubstr("the order must have each of 3 directions once, got [")));
  for (const auto& order :
       std::vector<std::vector<double>>{{0, 1, 0.5}, {1, 1, -1}, {1, -1, 0}, {0, 1}})
    EXPECT_THAT([&] { directions.read(at::tensor(order)); },
                testing::ThrowsMessage<std::invalid_argument>(testing::HasSubstr(
                    "directions must be different numbers from 0 to 2, and -1 behind them")));
  EXPECT_EQ(directions.read(at::tensor({2.0, 1.0, -1.0})),
            (std::pair<std::vector<int64_t>, int64_t>({2, 1, 0}, 2)));
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

}  // namespace
}  // namespace rankwise
