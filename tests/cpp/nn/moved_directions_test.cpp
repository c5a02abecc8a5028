// States of modules whose directions a RankAllocator moved, and who may move them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <sstream>

namespace {

using rankwise::RankAllocator;
using rankwise::nn::AdaLoRALinear;
using rankwise::nn::LoRALinearOptions;
using testing::HasSubstr;
using AdamW = rankwise::optim::WithCallbacks<torch::optim::AdamW>;

constexpr int freeze = 6, total = 10;

rankwise::AdaLoRAOptions options() {
  return rankwise::AdaLoRAOptions().initial_rank(4).target_rank(2).total_steps(total).final_steps(
      total - freeze);
}

struct NetImpl : torch::nn::Cloneable<NetImpl> {
  NetImpl() { reset(); }

  void reset() override {
    first = register_module("first", AdaLoRALinear(LoRALinearOptions(6, 8).rank(4).alpha(8)));
    second = register_module("second", AdaLoRALinear(LoRALinearOptions(8, 3).rank(4).alpha(8)));
    to(torch::kDouble);
  }

  at::Tensor forward(const at::Tensor& x) { return second(first(x).tanh()); }
  std::vector<int64_t> ranks() const { return {first->rank(), second->rank()}; }

  AdaLoRALinear first = nullptr, second = nullptr;
};
TORCH_MODULE(Net);

/// A net, its allocator and its optimizer, after so many steps.
struct Training {
  explicit Training(int steps, int64_t seed = 0) {
    torch::manual_seed(seed);
    net = Net();
    const torch::NoGradGuard no_grad;
    for (const auto& layer : {net->first, net->second})
      for (at::Tensor factor : {layer->lora_A, layer->lora_B, layer->lora_E})
        factor.normal_(0, 0.5);
    rankwise::freeze_base(*net);
    std::vector<at::Tensor> factors;
    for (const rankwise::Adapter& adapter : rankwise::adapters_of(*net))
      for (const at::Tensor& factor : adapter.factors()) factors.push_back(factor);
    optimizer = std::make_unique<AdamW>(factors, torch::optim::AdamWOptions(0.05));
    allocator = std::make_unique<RankAllocator>(*net, options());
    allocator->attach(*optimizer);
    train(0, steps);
  }

  void train(int from, int until) {
    const torch::AutoGradMode grad(true);
    for (int step = from; step < until; ++step) {
      torch::manual_seed(1000 + step);
      const at::Tensor x = torch::randn({9, 6}, torch::kDouble);
      optimizer->zero_grad();
      (net(x) - (3 * x.narrow(1, 0, 3)).sin()).square().mean().backward();
      optimizer->step();
    }
  }

  at::Tensor output() {
    const torch::NoGradGuard no_grad;
    return net(torch::linspace(-1, 1, 30, torch::kDouble).view({5, 6}));
  }

  Net net = nullptr;
  std::unique_ptr<AdamW> optimizer;
  std::unique_ptr<RankAllocator> allocator;
};

template <class Value>
std::string saved(const Value& value) {
  std::stringstream stream;
  torch::save(value, stream);
  return stream.str();
}

template <class Value>
void load(Value& value, const std::string& state) {
  std::stringstream stream(state);
  torch::load(value, stream);
}

template <class Error, class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(MovedDirections, AStateIsRestoredIntoAModelAtAnyStep) {
  for (const int taken : {0, 3, freeze, total}) {
    Training run(taken);
    const std::string state = saved(run.net);
    for (const int stop : {0, 3, freeze, total}) {
      Training other(stop, 9);
      load(other.net, state);
      EXPECT_TRUE(other.output().equal(run.output())) << taken << " into " << stop;
      EXPECT_EQ(other.net->ranks(), run.net->ranks());
      EXPECT_EQ(saved(other.net).size(), state.size());
    }
  }
}

TEST(MovedDirections, AWaitingAdaptersStateToo) {
  Training run(total), other(0, 9);
  const at::Tensor wanted = run.output();
  for (Training* each : {&run, &other}) {
    rankwise::add_adapter(*each->net, "other", rankwise::nn::AdapterOptions().rank(2));
    rankwise::activate_adapter(*each->net, "other");
  }
  load(other.net, saved(run.net));
  rankwise::activate_adapter(*other.net, "default");
  EXPECT_TRUE(other.output().equal(wanted));
}

TEST(MovedDirections, TheAllocatorRefusesAStateOfAnotherStepAlone) {
  Training run(total);
  const std::string early = saved(Training(3).net);
  load(run.net, early);
  EXPECT_THAT(message_of<c10::Error>([&] { run.allocator->step(); }),
              HasSubstr("'first' has rank 4"));
  EXPECT_THAT(message_of<c10::Error>([&] { run.allocator->orthogonality_penalty(); }),
              HasSubstr("a state of another step was loaded"));
}

TEST(MovedDirections, AllStatesOfAStepResumeItInAnyOrder) {
  for (const int taken : {3, freeze, total}) {
    for (const int stop : {0, total}) {
      for (const bool allocator_first : {false, true}) {
        Training run(taken), other(stop, 9);
        const std::string net = saved(run.net), allocator = saved(*run.allocator);
        std::stringstream optimizer;
        torch::serialize::OutputArchive archive;
        run.optimizer->save(archive);
        archive.save_to(optimizer);
        if (allocator_first) load(*other.allocator, allocator);
        load(other.net, net);
        if (!allocator_first) load(*other.allocator, allocator);
        torch::serialize::InputArchive loaded;
        loaded.load_from(optimizer);
        other.optimizer->load(loaded);
        run.train(taken, total + 2);
        other.train(taken, total + 2);
        EXPECT_TRUE(other.output().equal(run.output())) << taken << " " << stop;
        EXPECT_EQ(other.net->ranks(), run.net->ranks());
      }
    }
  }
}

TEST(MovedDirections, AnAllocatorMadeAfterTheModelWasLoaded) {
  Training run(total), other(0, 9);
  load(other.net, saved(run.net));
  RankAllocator resumed(*other.net, options());
  load(resumed, saved(*run.allocator));
  EXPECT_EQ(resumed.ranks(), run.allocator->ranks());
  EXPECT_TRUE(other.output().equal(run.output()));
}

TEST(MovedDirections, ACloneHasDirectionsOfItsOwn) {
  Training run(3);
  const auto copy = std::dynamic_pointer_cast<NetImpl>(run.net->clone());
  run.train(3, total);
  EXPECT_EQ(copy->ranks(), (std::vector<int64_t>{4, 4}));
  Net kept(copy);
  load(run.net, saved(kept));
  EXPECT_EQ(run.net->ranks(), (std::vector<int64_t>{4, 4}));
  RankAllocator allocator(*copy, options());
}

TEST(MovedDirections, OneAllocatorAtATime) {
  Training run(3);
  EXPECT_THAT(message_of<std::invalid_argument>([&] { RankAllocator(*run.net, options()); }),
              HasSubstr("'first' has an allocator already"));
  run.train(3, total);
  run.allocator->detach();
  const RankAllocator again(*run.net, options());
  EXPECT_THAT(message_of<c10::Error>([&] { run.allocator->step(); }),
              HasSubstr("no longer in charge"));

  Training fresh(0);
  RankAllocator second(*fresh.net, options());  // the first has made no step: it gives way
  second.attach(*fresh.optimizer);
  fresh.train(0, total);
  EXPECT_EQ(second.steps(), total);
  EXPECT_EQ(fresh.allocator->steps(), 0);
}

TEST(MovedDirections, AttachedOnce) {
  Training run(1);
  EXPECT_THAT(message_of<c10::Error>([&] { run.allocator->attach(*run.optimizer); }),
              HasSubstr("attached already"));
  AdamW other(run.net->parameters(), torch::optim::AdamWOptions(0.05));
  EXPECT_THAT(message_of<c10::Error>([&] { run.allocator->attach(other); }),
              HasSubstr("attached already"));
  run.optimizer.reset();
  auto handle = run.allocator->attach(other);
  handle.remove();
  run.allocator->attach(other);
}

TEST(MovedDirections, FactorsThatTheOptimizerDoesNotHoldAreNamed) {
  Training run(0);
  AdamW other({run.net->first->lora_A}, torch::optim::AdamWOptions(0.05));
  RankAllocator allocator(*run.net, options());
  allocator.attach(other);
  struct Handler : c10::WarningHandler {
    void process(const c10::Warning& warning) override { text += warning.msg(); }
    std::string text;
  } handler;
  const c10::WarningUtils::WarningHandlerGuard guard(&handler);
  run.net(torch::ones({2, 6}, torch::kDouble)).square().mean().backward();
  other.step();
  EXPECT_THAT(handler.text, HasSubstr("does not hold 'first.lora_B', 'first.lora_E', 'second"));
}

}  // namespace
