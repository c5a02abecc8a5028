// Two adapted layers in float64 for RankAllocator's tests, and a step of their training.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <string>
#include <vector>

namespace rankwise {

template <class Optimizer>
using WithCallbacks = optim::WithCallbacks<Optimizer>;

inline AdaLoRAOptions options() {
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

  std::vector<Adapter> adapters() {
    std::vector<Adapter> result;
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
      x = lora_linear(m == 0 ? x : x.tanh(), weights[m], {}, p[0], p[1], p[2], 2.0, 0.0, ranks[m]);
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

}  // namespace rankwise
