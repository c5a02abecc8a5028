// Adapters in float64 for SpectralAllocator's tests: alone, and in a small training.
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

inline SpectralOptions options() {
  return SpectralOptions().total_steps(1000).allocation_interval(1);
}

// Adapters in float64 that follow their ranks.
struct Adapters {
  struct Shape {
    int64_t in, out, rank, capacity;
  };
  std::vector<at::Tensor> A, B;
  std::vector<int64_t> ranks;

  explicit Adapters(const std::vector<Shape>& shapes) {
    torch::manual_seed(3);
    for (const auto& [in, out, rank, capacity] : shapes) {
      A.push_back(torch::zeros({capacity, in}, torch::kDouble));
      B.push_back(torch::zeros({out, capacity}, torch::kDouble));
      A.back().narrow(0, 0, rank).normal_();
      B.back().narrow(1, 0, rank).normal_();
      ranks.push_back(rank);
      A.back().requires_grad_();
      B.back().requires_grad_();
    }
  }

  std::vector<Adapter> list() {
    std::vector<Adapter> result;
    for (size_t m = 0; m < A.size(); ++m)
      result.push_back({"m" + std::to_string(m), A[m], B[m], {}, ranks[m], [this, m](int64_t rank) {
                          ranks[m] = rank;
                        }});
    return result;
  }

  at::Tensor update(size_t m) const { return B[m].detach().matmul(A[m].detach()); }

  // As of a loss whose gradient with respect to the update is G.
  void set_gradients(size_t m, const at::Tensor& G) {
    A[m].mutable_grad() = B[m].detach().t().matmul(G);
    B[m].mutable_grad() = G.matmul(A[m].detach().t());
  }
};

inline std::vector<int64_t> ranks_of(const SpectralAllocator& allocator) {
  std::vector<int64_t> ranks;
  for (const auto& [name, rank] : allocator.ranks()) ranks.push_back(rank);
  return ranks;
}

struct Train {
  Adapters adapters{{{9, 7, 3, 6}, {7, 5, 3, 5}}};
  at::Tensor W1, W2, x;

  Train() {
    torch::manual_seed(1);
    W1 = torch::randn({7, 9}, torch::kDouble);
    W2 = torch::randn({5, 7}, torch::kDouble);
    x = torch::randn({32, 9}, torch::kDouble);
    for (const at::Tensor& B : adapters.B) B.detach().zero_();
  }

  at::Tensor forward() const {
    const auto& a = adapters;
    const at::Tensor hidden = lora_linear(x, W1, {}, a.A[0], a.B[0], {}, 2.0, 0.0, a.ranks[0]);
    return lora_linear(hidden.tanh(), W2, {}, a.A[1], a.B[1], {}, 2.0, 0.0, a.ranks[1]);
  }

  std::vector<at::Tensor> parameters() const {
    return {adapters.A[0], adapters.B[0], adapters.A[1], adapters.B[1]};
  }

  template <class Optimizer>
  double step(Optimizer& optimizer) {
    optimizer.zero_grad();
    const at::Tensor loss = (forward() - x.narrow(1, 0, 5).sin() * 3).square().mean();
    loss.backward();
    optimizer.step();
    return loss.template item<double>();
  }
};

inline SpectralOptions schedule() {
  SpectralOptions chosen;
  return chosen.total_steps(60).warmup_steps(5).final_steps(10).allocation_interval(5).min_age(6);
}

template <class Action>
std::string error_of(const Action& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace rankwise
