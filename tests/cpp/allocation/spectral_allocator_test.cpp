// SpectralAllocator from C++: events, what they keep, and what is refused.
#include <random>

#include "spectral_adapters.h"

namespace rankwise {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// 10,000 events: of shapes, ties, zero factors, rank 0, capacity reached.
TEST(SpectralAllocator, RandomEventsConserveParametersAndTellTheChange) {
  const int threads = at::get_num_threads();
  at::set_num_threads(1);  // such small matrices gain nothing by more
  std::mt19937_64 random(5);
  const auto uniform = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int training = 0; training < 500; ++training) {
    std::vector<Adapters::Shape> shapes;
    for (int64_t m = uniform(1, 4); m > 0; --m) {
      const int64_t in = uniform(1, 14), out = uniform(1, 14), side = std::min(in, out);
      const int64_t rank = uniform(0, side), capacity = uniform(std::max<int64_t>(rank, 1), side);
      shapes.push_back({in, out, rank, capacity});
    }
    Adapters adapters(shapes);
    SpectralOptions chosen = options().beta(0.5).min_rank(uniform(0, 2)).min_age(uniform(0, 3));
    chosen.ramp_steps(uniform(0, 2))
        .probes(uniform(0, 2))
        .seed(training)
        .sensitivity_weight(0.25 * uniform(0, 8));
    chosen.exchange({.threshold = 0.1 * uniform(0, 3),
                     .hysteresis = 0.1 * uniform(0, 5),
                     .max_moves = uniform(-1, 5)});
    if (uniform(0, 1) == 0) chosen.score(SpectralScore::literal);
    SpectralAllocator allocator(adapters.list(), chosen);
    const int64_t budget = allocator.budget();
    for (int event = 0; event < 20; ++event) {
      std::vector<at::Tensor> before;
      const std::vector<int64_t> ranks = ranks_of(allocator);
      for (size_t m = 0; m < shapes.size(); ++m) {
        if (uniform(0, 9) == 0) adapters.B[m].detach().zero_();
        adapters.set_gradients(m, torch::randn({shapes[m].out, shapes[m].in}, torch::kDouble));
        before.push_back(adapters.update(m));
      }
      allocator.step();
      const SpectralEvent& told = allocator.history().back();
      ASSERT_EQ(told.step, event + 1);
      ASSERT_EQ(told.ranks, ranks_of(allocator));
      int64_t cost = 0, dropped = 0, added = 0;
      double change = 0;
      for (size_t m = 0; m < shapes.size(); ++m) {
        const auto& [in, out, first, capacity] = shapes[m];
        const int64_t rank = told.ranks[m], probes = adapters.ranks[m] - rank;
        ASSERT_LE(probes, chosen.probes());
        ASSERT_GE(rank, std::min(first, chosen.min_rank()));
        ASSERT_LE(rank + probes, capacity);
        cost += rank * (in + out);
        dropped += std::max<int64_t>(ranks[m] - rank, 0);
        added += std::max<int64_t>(rank - ranks[m], 0);
        const double moved = (adapters.update(m) - before[m]).norm().item<double>();
        change += moved * moved;
        ASSERT_TRUE(rank < ranks[m] || moved == 0);
        ASSERT_FALSE(adapters.A[m].detach().slice(0, rank).any().item<bool>());
        ASSERT_FALSE(adapters.B[m].detach().slice(1, rank + probes).any().item<bool>());
      }
      ASSERT_EQ(cost + allocator.bank(), budget);
      ASSERT_EQ(told.bank, allocator.bank());
      ASSERT_EQ(told.dropped, dropped);
      ASSERT_EQ(told.added, added);
      ASSERT_NEAR(told.change, std::sqrt(change), 1e-11);
    }
  }
  at::set_num_threads(threads);
}

TEST(SpectralAllocator, ScoresAreSingularValuesAndTheirGradients) {
  Adapters adapters({{6, 6, 2, 2}});
  const auto set = [](at::Tensor t, double first, double second) {
    t.zero_();
    t[0][0] = first;
    t[1][1] = second;
  };
  set(adapters.A[0].detach(), 1, 1);
  set(adapters.B[0].detach(), 3, 2);  // singular values 3 and 2
  at::Tensor G = torch::zeros({6, 6}, torch::kDouble);
  G[1][1] = -4;
  adapters.set_gradients(0, G);
  SpectralAllocator allocator(adapters.list(),
                              options().score(SpectralScore::literal).sensitivity_weight(0.5));
  allocator.step();
  EXPECT_NEAR(allocator.history().back().lowest_kept, 3, 1e-12);  // 3 + 0, and 2 + 0.5 * 4
}

TEST(SpectralAllocator, RemembersWhatDroppedDirectionsScored) {
  Adapters adapters({{6, 6, 3, 4}});
  std::vector<std::vector<double>> scores, former;
  SpectralAllocator allocator(
      adapters.list(),
      options().min_age(0).budget_at([](int64_t) { return 1000; }).rule([&](const auto& question) {
        scores.push_back(question.scores[0]);
        former.push_back(question.former[0]);
        return std::vector<int64_t>{question.step == 1 ? 1 : 2};
      }));
  for (int event = 0; event < 3; ++event) {
    adapters.set_gradients(0, torch::randn({6, 6}, torch::kDouble));
    allocator.step();
  }
  EXPECT_THAT(former[0], ElementsAre(testing::IsNan()));
  EXPECT_THAT(former[1], ElementsAre(scores[0][1], scores[0][2], testing::IsNan()));
  EXPECT_THAT(former[2], ElementsAre(scores[0][2], testing::IsNan()));
}

TEST(SpectralAllocator, ThreadsDoNotChangeTheResult) {
  const int before = at::get_num_threads();
  std::vector<at::Tensor> first;
  for (const int threads : {1, 2, 4}) {
    at::set_num_threads(threads);
    Adapters adapters({{700, 300, 12, 16}, {256, 512, 12, 16}, {64, 64, 12, 20}});
    SpectralAllocator allocator(adapters.list(), options());
    for (int i = 0; i < 3; ++i) {
      torch::manual_seed(i);
      for (size_t m = 0; m < 3; ++m)
        adapters.set_gradients(
            m, torch::randn({adapters.B[m].size(0), adapters.A[m].size(1)}, torch::kDouble));
      // Gradients, too, must be the same: they are products of their own.
      for (const at::Tensor& factor : {adapters.A[0], adapters.B[1]})
        factor.mutable_grad() = torch::randn(factor.sizes(), torch::kDouble);
      for (const at::Tensor& factor : {adapters.B[0], adapters.A[1], adapters.A[2], adapters.B[2]})
        factor.mutable_grad() = torch::ones(factor.sizes(), torch::kDouble);
      allocator.step();
    }
    std::vector<at::Tensor> now;
    for (size_t m = 0; m < 3; ++m) {
      now.push_back(adapters.A[m].detach());
      now.push_back(adapters.B[m].detach());
    }
    if (first.empty()) first = now;
    for (size_t i = 0; i < now.size(); ++i) EXPECT_TRUE(now[i].equal(first[i])) << threads;
  }
  at::set_num_threads(before);
}

TEST(SpectralAllocator, GradientsThatAreNotFiniteChangeNothing) {
  Adapters adapters({{6, 6, 3, 5}, {6, 6, 3, 5}});
  SpectralAllocator allocator(adapters.list(), options());
  const at::Tensor before = adapters.A[0].detach().clone();
  for (size_t m = 0; m < 2; ++m) adapters.set_gradients(m, torch::randn({6, 6}, torch::kDouble));
  adapters.A[1].mutable_grad()[0][0] = std::numeric_limits<double>::infinity();
  allocator.step();
  EXPECT_EQ(allocator.skipped_steps(), 1);
  EXPECT_EQ(allocator.steps(), 0);
  EXPECT_TRUE(allocator.history().empty());
  EXPECT_TRUE(adapters.A[0].equal(before));
}

TEST(SpectralAllocator, CallsBackAfterEachStepAndSkippedOnes) {
  Adapters adapters({{6, 6, 3, 5}, {6, 6, 3, 5}});
  SpectralAllocator allocator(adapters.list(), options());
  std::vector<int64_t> steps, spent;
  allocator.on_step([&](const rankwise::Allocator& now) {
    steps.push_back(now.steps() + now.skipped_steps());
    int64_t sum = 0;
    for (const auto& [name, rank] : now.ranks()) sum += 12 * rank;
    spent.push_back(sum + allocator.bank() - now.budget());
  });
  for (int i = 0; i < 3; ++i) {
    for (size_t m = 0; m < 2; ++m) adapters.set_gradients(m, torch::randn({6, 6}, torch::kDouble));
    if (i == 1) adapters.A[1].mutable_grad()[0][0] = std::numeric_limits<double>::infinity();
    allocator.step();
  }
  EXPECT_THAT(steps, testing::ElementsAre(1, 2, 3));
  EXPECT_THAT(spent, testing::ElementsAre(0, 0, 0));
  EXPECT_EQ(allocator.schedule().budget(3), allocator.budget());
}

TEST(SpectralAllocator, RefusesWhatCannotBe) {
  const auto made = [](const SpectralOptions& chosen) {
    return error_of([&] {
      Adapters adapters({{6, 4, 2, 4}, {4, 6, 2, 4}});
      SpectralAllocator allocator(adapters.list(), chosen);
    });
  };
  EXPECT_EQ(made(options()), "no error");
  EXPECT_THAT(made(options().allocation_interval(0)),
              HasSubstr("allocation_interval must be at least 1, got 0"));
  EXPECT_THAT(made(options().final_steps(1001)), HasSubstr("must be less than total_steps 1000"));
  EXPECT_THAT(made(options().min_rank(3).max_rank(2)),
              HasSubstr("max_rank must be at least min_rank 3, or 0 for the capacity, got 2"));
  EXPECT_THAT(made(options().final_budget(19)),
              HasSubstr("must be at least 20, what min_rank 1 needs, got 19"));
  EXPECT_THAT(made(options().initial_budget(39)),
              HasSubstr("initial_budget must be at least what the first ranks cost, 40, got 39"));
  EXPECT_THAT(made(options().final_budget(41)),
              HasSubstr("final_budget must be at most what the first ranks cost, 40, got 41"));
  EXPECT_THAT(made(options().initial_budget(50).final_budget(51)),
              HasSubstr("final_budget must be at most initial_budget 50, got 51"));
  EXPECT_THAT(made(options().sensitivity_weight(-1)),
              HasSubstr("sensitivity_weight must be at least 0, got -1"));
  EXPECT_THAT(made(options().beta(-0.1)), HasSubstr("beta must be in [0, 1), got -0.1"));
  EXPECT_THAT(made(options().exchange({.hysteresis = 1})),
              HasSubstr("hysteresis must be in [0, 1), got 1"));
  EXPECT_THAT(made(options().exchange({.threshold = -1})),
              HasSubstr("threshold must be at least 0, got -1"));
  EXPECT_THAT(made(options().exchange({.kth_least = 0})),
              HasSubstr("kth_least must be at least 1, got 0"));
  EXPECT_THAT(error_of([] {
                Adapters wide({{6, 2, 3, 3}});
                SpectralAllocator allocator(wide.list(), options());
              }),
              HasSubstr("the rank of 'm0' must be at most 2, the smaller side"));
  Adapters adapters({{6, 4, 2, 4}, {4, 6, 2, 4}});
  SpectralAllocator allocator(adapters.list(), options().rule([](const auto&) {
    return std::vector<int64_t>{4, 4};
  }));
  EXPECT_THAT(error_of([&] { allocator.step(); }), HasSubstr("no adapter has a gradient"));
  for (size_t m = 0; m < 2; ++m)
    adapters.set_gradients(
        m, torch::randn({adapters.B[m].size(0), adapters.A[m].size(1)}, torch::kDouble));
  EXPECT_THAT(error_of([&] { allocator.step(); }),
              HasSubstr("the rule's ranks of step 1 must cost at most the budget 40, got 80"));
  EXPECT_THAT(adapters.ranks, ElementsAre(2, 2));
}

TEST(SpectralAllocator, RefusesAnOptimizersStateThatCannotFollow) {
  Adapters adapters({{6, 6, 3, 3}});
  SpectralAllocator allocator(adapters.list(),
                              options().rule([](const auto&) { return std::vector<int64_t>{2}; }));
  adapters.set_gradients(0, torch::randn({6, 6}, torch::kDouble));
  const at::Tensor before = adapters.A[0].detach().clone();
  EXPECT_THAT(error_of([&] {
                allocator.step({.moments_of = [](const at::Tensor&) { return std::nullopt; }});
              }),
              HasSubstr("the optimizer's state of 'm0' cannot follow"));
  EXPECT_TRUE(adapters.A[0].equal(before));
  EXPECT_EQ(allocator.steps(), 0);
}

TEST(SpectralAllocator, RefusesMomentsOfAnotherShape) {
  Adapters adapters({{6, 6, 3, 3}});
  SpectralAllocator allocator(adapters.list(),
                              options().rule([](const auto&) { return std::vector<int64_t>{2}; }));
  adapters.set_gradients(0, torch::randn({6, 6}, torch::kDouble));
  const at::Tensor before = adapters.A[0].detach().clone();
  for (const bool second : {false, true}) {
    const auto moments = [&](const at::Tensor& factor) {
      Moments like;
      like.first = {second ? at::zeros_like(factor) : at::zeros({3})};
      like.second = {at::zeros({3})};
      return std::optional(like);
    };
    EXPECT_THAT(error_of([&] { allocator.step({.moments_of = moments}); }),
                HasSubstr("optimizer state must be [3, 6] like the parameter, got [3]"));
  }
  EXPECT_TRUE(adapters.A[0].equal(before));
  EXPECT_EQ(allocator.steps(), 0);
}

TEST(SpectralAllocator, FactorsThatAreNotFiniteAreNamedAndNothingIsChanged) {
  for (const bool in_A : {true, false}) {
    Adapters adapters({{6, 6, 3, 5}, {6, 6, 3, 5}});
    SpectralAllocator allocator(adapters.list(), options());
    for (size_t m = 0; m < 2; ++m) adapters.set_gradients(m, torch::randn({6, 6}, torch::kDouble));
    const at::Tensor factor = in_A ? adapters.A[1] : adapters.B[1];
    factor.detach()[0][0] = std::numeric_limits<double>::infinity();
    const at::Tensor before = adapters.A[0].detach().clone();
    EXPECT_THAT(error_of([&] { allocator.step(); }),
                HasSubstr("the factors of 'm1' are infinite or NaN at step 1"));
    EXPECT_TRUE(adapters.A[0].equal(before));
    EXPECT_THAT(adapters.ranks, ElementsAre(3, 3));
  }
}

TEST(SpectralAllocator, LayersOfAModelFollowAndSaveWhatTheyKept) {
  torch::manual_seed(2);
  torch::nn::Sequential model(nn::LoRALinear(nn::LoRALinearOptions(12, 8).rank(3).capacity(6)),
                              nn::LoRALinear(nn::LoRALinearOptions(8, 8).rank(3).capacity(6)));
  SpectralAllocator allocator(*model, options().rule([](const auto&) {
    return std::vector<int64_t>{2, 4};
  }));
  freeze_base(*model);
  std::vector<at::Tensor> factors;
  for (const Adapter& adapter : adapters_of(*model))
    factors.insert(factors.end(), {adapter.lora_A, adapter.lora_B});
  WithCallbacks<torch::optim::AdamW> optimizer(factors, torch::optim::AdamWOptions(1e-2));
  allocator.attach(optimizer);
  model->forward(torch::randn({4, 12})).square().mean().backward();
  optimizer.step();
  EXPECT_EQ(model->ptr<nn::LoRALinearImpl>(0)->rank(), 2);
  EXPECT_EQ(model->ptr<nn::LoRALinearImpl>(1)->rank(), 4);
  EXPECT_THAT(error_of([&] { SpectralAllocator other(*model, options()); }),
              HasSubstr("'0' has an allocator already"));
}

}  // namespace
}  // namespace rankwise
