// SpectralAllocator on a device that is late and has hardly any operators: the CPU's bits.
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include "late_device.h"

namespace rankwise {
namespace {

// Adapters of one device with momenta, whose optimizer writes numbers of a seed.
class Training {
 public:
  Training(at::Device device, const SpectralOptions& options) : device_(device) {
    std::vector<Adapter> adapters;
    for (const auto& [in, out] : {std::pair(7, 9), std::pair(6, 5), std::pair(8, 6)}) {
      for (const auto& size : {std::vector<int64_t>{5, in}, std::vector<int64_t>{out, 5}}) {
        factors_.push_back(placed(torch::zeros(size)));
        momenta_.push_back(placed(torch::zeros(size)));
      }
      const size_t m = adapters.size();
      adapters.push_back(
          {std::to_string(m), factors_[2 * m], factors_[2 * m + 1], {}, 3, [this, m](int64_t rank) {
             ranks_[m] = rank;
           }});
    }
    allocator_ = std::make_unique<SpectralAllocator>(std::move(adapters), options);
  }

  void step(int seed, bool spoilt) {
    torch::manual_seed(seed);
    for (size_t i = 0; i < factors_.size(); ++i) {
      const int64_t dim = i % 2, rank = ranks_[i / 2];
      const auto numbers = [&] {  // of the directions in use
        at::Tensor values = torch::randn(factors_[i].sizes());
        values.narrow(dim, rank, 5 - rank).zero_();
        return values;
      };
      at::Tensor gradient = numbers();
      if (spoilt && i == 3) gradient.view(-1)[0] = NAN;
      write(factors_[i], numbers());
      write(momenta_[i], numbers());
      factors_[i].mutable_grad() = placed(gradient);
    }
    const auto moments_of = [&](const at::Tensor& factor) -> std::optional<Moments> {
      for (size_t i = 0; i < factors_.size(); ++i)
        if (factors_[i].is_same(factor)) return Moments{{momenta_[i]}, {}};
      return std::nullopt;
    };
    allocator_->step({.moments_of = moments_of});
  }

  std::map<std::string, at::Tensor> everything() const {
    std::map<std::string, at::Tensor> all;
    for (const auto& [name, tensor] : allocator_->state()) all[name] = tensor.cpu();
    for (size_t i = 0; i < factors_.size(); ++i) {
      all["factor " + std::to_string(i)] = factors_[i].cpu();
      all["momentum " + std::to_string(i)] = momenta_[i].cpu();
      all["gradient " + std::to_string(i)] = factors_[i].grad().cpu();
    }
    return all;
  }

  const SpectralAllocator& allocator() const { return *allocator_; }

 private:
  at::Tensor placed(const at::Tensor& tensor) const {
    return device_.is_cpu() ? tensor : late_device::put(tensor);
  }

  void write(const at::Tensor& tensor, const at::Tensor& value) const {
    device_.is_cpu() ? void(tensor.copy_(value)) : late_device::overwrite(tensor, value);
  }

  at::Device device_;
  std::vector<at::Tensor> factors_, momenta_;
  std::array<int64_t, 3> ranks_{3, 3, 3};
  std::unique_ptr<SpectralAllocator> allocator_;
};

void compare(const SpectralOptions& options) {
  Training here(at::kCPU, options), there(late_device::device(), options);
  for (int step = 0; step < 12; ++step) {
    for (Training* training : {&here, &there}) training->step(step, step == 5);
    const auto wanted = here.everything(), found = there.everything();
    for (const auto& [name, tensor] : wanted)
      ASSERT_TRUE(at::allclose(found.at(name), tensor, 0, 0, /*equal_nan=*/true))
          << name << " after step " << step;
  }
  EXPECT_EQ(here.allocator().skipped_steps(), 1);
  int64_t moved = 0;
  for (const SpectralEvent& event : here.allocator().history()) moved += event.dropped;
  EXPECT_GT(moved, 0);
}

TEST(SpectralAllocatorDevice, GivesTheBitsOfTheCpu) {
  const auto to_and_fro = [](const RankQuestion& question) {
    return question.step % 4 == 0 ? std::vector<int64_t>{2, 4, 3} : std::vector<int64_t>{3, 2, 4};
  };
  const auto options =
      SpectralOptions().total_steps(12).allocation_interval(2).initial_budget(150).rule(to_and_fro);
  compare(options);
  compare(SpectralOptions(options).probes(2));
}

}  // namespace
}  // namespace rankwise
