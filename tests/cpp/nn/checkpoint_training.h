// A small training with dropout, whose data come from torch's generator, for tests of checkpoints.
#pragma once

#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <memory>
#include <string>
#include <vector>

#include "../io/temporary_folder.h"

namespace checkpoint_training {

enum class Method { lora, adalora, spectral };

constexpr int64_t steps = 20;

inline torch::nn::Sequential net_of(Method method, int64_t width = 12) {
  using namespace rankwise::nn;
  const auto options = [&](int64_t in, int64_t out) {
    LoRALinearOptions chosen(in, out);
    chosen.rank(3).alpha(6).dropout(0.2);
    return method == Method::spectral ? chosen.capacity(5) : chosen;
  };
  const auto first = options(6, width), second = options(width, 4);
  torch::nn::Sequential net;
  if (method == Method::adalora) {
    net->push_back(AdaLoRALinear{first});
    net->push_back(torch::nn::BatchNorm1d(width));
    net->push_back(AdaLoRALinear{second});
  } else {
    net->push_back(LoRALinear{first});
    net->push_back(torch::nn::BatchNorm1d(width));
    net->push_back(LoRALinear{second});
  }
  return net;
}

/// Frozen from step 14 on.
inline rankwise::AdaLoRAOptions schedule() {
  return rankwise::AdaLoRAOptions()
      .initial_rank(3)
      .target_rank(1)
      .total_steps(steps)
      .warmup_steps(2)
      .final_steps(6)
      .allocation_interval(2);
}

template <class Optimizer>
struct Training {
  template <class Options>
  Training(Method method, const Options& options)
      : net((torch::manual_seed(1), net_of(method))), optimizer(net->parameters(), options) {
    rankwise::freeze_base(*net);
    if (method == Method::adalora)
      allocator = std::make_unique<rankwise::RankAllocator>(*net, schedule());
    if (method == Method::spectral)
      allocator = std::make_unique<rankwise::SpectralAllocator>(
          *net,
          rankwise::SpectralOptions().total_steps(steps).allocation_interval(4).ramp_steps(2));
    if (allocator) allocator->attach(optimizer);
  }

  double step() {
    optimizer.zero_grad();
    const auto loss = (net->forward(torch::randn({8, 6})) - 1).square().mean();
    loss.backward();
    optimizer.step();
    return loss.template item<double>();
  }
  std::vector<double> train(int64_t count) {
    std::vector<double> losses;
    for (int64_t i = 0; i < count; ++i) losses.push_back(step());
    return losses;
  }
  void save(const std::filesystem::path& folder, int64_t at) {
    rankwise::save_checkpoint(folder, *net, optimizer, allocator.get(), at);
  }
  int64_t load(const std::filesystem::path& folder) {
    return rankwise::load_checkpoint(folder, *net, optimizer, allocator.get());
  }
  /// All that a checkpoint has, byte for byte.
  std::string everything() {
    const TemporaryFolder folder;
    save(folder.path(), 0);
    return folder.read("training.json") + folder.read("training.safetensors") +
           folder.read("adapter_model.safetensors");
  }

  torch::nn::Sequential net;
  rankwise::optim::WithCallbacks<Optimizer> optimizer;
  std::unique_ptr<rankwise::Allocator> allocator;
};

inline Training<torch::optim::AdamW> adamw(Method method) {
  return {method, torch::optim::AdamWOptions(2e-2).weight_decay(0.1).amsgrad(true)};
}
inline Training<torch::optim::SGD> sgd(Method method) {
  return {method, torch::optim::SGDOptions(5e-2).momentum(0.9).nesterov(true)};
}

}  // namespace checkpoint_training
