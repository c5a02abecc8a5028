// RankAllocator on a device that is late: the CPU's bits, and steps that wait for nothing.
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <random>

#include "late_device.h"

namespace {

using rankwise::AdaLoRAOptions;
using rankwise::RankAllocator;

constexpr int64_t rank = 5;

// Adapters of one device with their momenta, whose optimizer writes what it is told to.
class Training {
 public:
  Training(at::Device device, const AdaLoRAOptions& options) : device_(device) {
    for (const auto& [in, out] : {std::pair(7, 9), std::pair(3, 4), std::pair(1, 6)}) {
      for (const auto& size : {std::vector<int64_t>{rank, in}, std::vector<int64_t>{out, rank},
                               std::vector<int64_t>{rank, 1}}) {
        parameters_.push_back(placed(torch::ones(size)));
        momenta_.push_back(placed(torch::ones(size)));
      }
    }
    std::vector<rankwise::Adapter> adapters;
    for (size_t m = 0; m < 3; ++m) {
      adapters.push_back({std::to_string(m), parameters_[3 * m], parameters_[3 * m + 1],
                          parameters_[3 * m + 2], rank,
                          [this, m](int64_t value) { told_[m] = value; }});
    }
    allocator_ = std::make_unique<RankAllocator>(std::move(adapters), options);
  }

  // One step with numbers of this seed; `spoilt`: a gradient that is not finite.
  void step(int seed, bool spoilt, std::optional<float> found_inf, size_t missing) {
    torch::manual_seed(seed);
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const auto sizes = parameters_[i].sizes();
      const at::Tensor gradient = zeros_ ? torch::zeros(sizes) : torch::randn(sizes);
      if (spoilt && i == 4) gradient.view(-1)[gradient.numel() - 1] = NAN;
      write(parameters_[i], torch::randn(sizes));
      write(momenta_[i], torch::randn(sizes));
      parameters_[i].mutable_grad() = i == missing ? at::Tensor() : placed(gradient);
    }
    const auto before = late_device::waits();
    allocator_->step(view(found_inf));
    waited_ = late_device::waits() - before;
  }

  void clear_gradients(bool zeros) { zeros_ = zeros; }

  void freeze() { allocator_->freeze(view({})); }

  // Parameters, momenta and the allocator's state, on the CPU.
  std::map<std::string, at::Tensor> everything() const {
    std::map<std::string, at::Tensor> all;
    for (const auto& [name, tensor] : allocator_->state()) all[name] = tensor.cpu();
    for (size_t i = 0; i < parameters_.size(); ++i) {
      all["parameter " + std::to_string(i)] = parameters_[i].cpu();
      all["momentum " + std::to_string(i)] = momenta_[i].cpu();
    }
    for (size_t m = 0; m < 3; ++m) all["told " + std::to_string(m)] = at::scalar_tensor(told_[m]);
    return all;
  }

  RankAllocator& allocator() { return *allocator_; }
  int64_t waited() const { return waited_; }  // in the last step

 private:
  at::Tensor placed(const at::Tensor& tensor) const {
    return device_.is_cpu() ? tensor : late_device::put(tensor);
  }

  void write(const at::Tensor& tensor, const at::Tensor& value) const {
    device_.is_cpu() ? void(tensor.copy_(value)) : late_device::overwrite(tensor, value);
  }

  rankwise::OptimizerView view(std::optional<float> found_inf) {
    const auto state_of = [this](const at::Tensor& parameter) {
      std::optional<std::vector<at::Tensor>> state;
      for (size_t i = 0; i < parameters_.size(); ++i)
        if (parameter.is_same(parameters_[i])) state = {momenta_[i]};
      return state;
    };
    return {state_of, found_inf ? placed(torch::full({}, *found_inf)) : at::Tensor()};
  }

  at::Device device_;
  std::vector<at::Tensor> parameters_, momenta_;
  std::array<int64_t, 3> told_ = {rank, rank, rank};
  std::unique_ptr<RankAllocator> allocator_;
  int64_t waited_ = 0;
  bool zeros_ = false;
};

void expect_same(const Training& got, const Training& wanted, const std::string& where) {
  const auto a = got.everything(), b = wanted.everything();
  ASSERT_EQ(a.size(), b.size()) << where;
  for (const auto& [name, tensor] : b) {
    ASSERT_TRUE(a.contains(name)) << name << ", " << where;
    const at::Tensor& other = a.at(name);
    EXPECT_TRUE(other.dtype() == tensor.dtype() &&
                at::allclose(other, tensor, 0, 0, /*equal_nan=*/true))
        << name << ", " << where << ": got " << other << ", wanted " << tensor;
  }
}

struct Warnings : c10::WarningHandler {
  int of_zeros = 0;
  void process(const c10::Warning& warning) override {
    of_zeros += warning.msg().find("all gradients are zero") != std::string::npos;
  }
};

AdaLoRAOptions options() {
  return AdaLoRAOptions().initial_rank(rank).target_rank(2).total_steps(30).final_steps(8);
}

TEST(LateDevice, OnlyTheFreezeStepWaits) {
  for (const bool shrink : {true, false}) {
    Training training(late_device::device(), options().warmup_steps(4).shrink(shrink));
    for (int64_t call = 1; call <= 36; ++call) {
      training.step(static_cast<int>(call), false, 0.0f, 9);
      EXPECT_EQ(training.waited() > 0, call == 22) << "step " << call;
      EXPECT_EQ(training.allocator().frozen(), call >= 22) << "step " << call;
    }
    EXPECT_EQ(training.allocator().steps(), 36);
  }
}

TEST(LateDevice, SkippedStepsThatAreKnownOfCostNoFurtherWait) {
  Training training(late_device::device(), options());
  for (int64_t call = 1; call <= 40; ++call) {
    training.step(static_cast<int>(call), call <= 5, {}, 9);
    if (call == 10) late_device::proceed(1'000'000);  // a GPU is a few steps behind, not forty
    EXPECT_EQ(training.waited() > 0, call == 27) << "step " << call;
  }
  EXPECT_EQ(training.allocator().skipped_steps(), 5);
}

TEST(LateDevice, ZeroGradientsAreWarnedOfWhenTheDeviceGetsThere) {
  Warnings warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  Training training(late_device::device(), options());
  for (int64_t call = 1; call <= 6; ++call) {
    training.clear_gradients(call == 2);
    training.step(static_cast<int>(call), false, {}, 9);
    EXPECT_EQ(warnings.of_zeros, call > 4) << "step " << call;
    if (call == 4) late_device::proceed(1'000'000);
  }
}

TEST(LateDevice, HasTheCpusBitsWhateverIsSkippedAndWhenever) {
  at::set_num_threads(1);  // thousands of small steps
  Warnings warnings;       // of gradients that are missing
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  std::mt19937 random(1);
  const auto one_in = [&](int n) { return random() % n == 0; };
  for (int round = 0; round < 60; ++round) {
    const auto chosen = options()
                            .warmup_steps(random() % 6)
                            .allocation_interval(1 + random() % 4)
                            .shrink(!one_in(3))
                            .min_rank(random() % 2)
                            .budget_unit(one_in(2) ? rankwise::BudgetUnit::parameters
                                                   : rankwise::BudgetUnit::triplets);
    Training cpu(at::kCPU, chosen), late(late_device::device(), chosen);
    const int rarity = 1 + random() % 12;  // of skipped steps; 1: about half of them
    const int freeze_at = one_in(5) ? random() % 40 : -1;
    for (int call = 0; call < 60; ++call) {
      const std::string where = "round " + std::to_string(round) + ", step " + std::to_string(call);
      const bool spoilt = one_in(rarity + 1);
      const std::optional<float> inf =
          one_in(2) ? std::nullopt : std::optional(one_in(rarity + 1) ? 1.0f : 0.0f);
      const size_t missing = one_in(4) ? random() % 9 : 9;
      for (Training* training : {&cpu, &late}) training->step(call, spoilt, inf, missing);
      ASSERT_EQ(late.allocator().frozen(), cpu.allocator().frozen()) << where;
      if (call + 1 < chosen.freeze_step()) {
        ASSERT_EQ(late.waited(), 0) << where;
      }
      if (call == freeze_at)
        for (Training* training : {&cpu, &late}) training->freeze();
      if (one_in(3)) late_device::proceed(random() % 30);
      if (one_in(20)) expect_same(late, cpu, where);
      if (one_in(20)) late.allocator().load_state(cpu.allocator().state());
    }
    expect_same(late, cpu, "round " + std::to_string(round));
    if (HasFailure()) return;
  }
}

}  // namespace
