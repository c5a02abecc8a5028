// Eight trainings in eight threads, each of a model and an allocator of its own: no race, and the
// bits of a training alone.
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>
#include <rankwise/cpu_path.h>
#include <rankwise/ops.h>
#include <rankwise/optim.h>
#include <rankwise/rank_allocator.h>
#include <torch/torch.h>

#include <thread>

#include "run_blocks.h"

namespace {

constexpr int64_t threads = 8, steps = 1000;

/// Two adapted layers, one after the other, that are pruned from step 10 to step `steps - 100`.
class Training {
 public:
  Training(int64_t number, at::ScalarType dtype, double dropout)
      : random_(at::make_generator<at::CPUGeneratorImpl>(number)),
        dtype_(dtype),
        dropout_(dropout),
        adapters_{adapter("first", 24, 40), adapter("second", 40, 16)},
        optimizer_(factors(), torch::optim::AdamWOptions(1e-2)),
        allocator_(adapters_, rankwise::AdaLoRAOptions()
                                  .initial_rank(4)
                                  .target_rank(2)
                                  .total_steps(steps)
                                  .warmup_steps(10)
                                  .final_steps(100)
                                  .allocation_interval(5)) {
    allocator_.attach(optimizer_);
  }
  Training(const Training&) = delete;
  Training& operator=(const Training&) = delete;

  void run(int64_t count) {
    for (int64_t i = 0; i < count; ++i) step();
  }

  /// Factors, ranks and the sum of the losses.
  std::vector<at::Tensor> results() const {
    std::vector<at::Tensor> result = factors();
    for (const auto& [name, rank] : allocator_.ranks()) result.push_back(torch::tensor(rank));
    result.push_back(torch::tensor(losses_));
    return result;
  }

 private:
  at::Tensor normal(at::IntArrayRef size) { return at::randn(size, random_, dtype_); }

  rankwise::Adapter adapter(const char* name, int64_t in, int64_t out) {
    const size_t m = weights_.size();
    weights_.push_back(normal({out, in}) / 5);
    const auto factor = [&](at::IntArrayRef size) { return (normal(size) / 4).requires_grad_(); };
    return {name,           factor({4, in}), factor({out, 4}),
            factor({4, 1}), ranks_[m],       [this, m](int64_t rank) { ranks_[m] = rank; }};
  }

  std::vector<at::Tensor> factors() const {
    std::vector<at::Tensor> result;
    for (const rankwise::Adapter& adapter : adapters_)
      for (const at::Tensor& factor : adapter.factors()) result.push_back(factor);
    return result;
  }

  void step() {
    at::Tensor x = normal({9, 24});
    for (size_t m = 0; m < 2; ++m) {
      const auto [A, B, E] = adapters_[m].factors();
      x = rankwise::lora_linear(x, weights_[m], {}, A, B, E, 0.5, dropout_, ranks_[m]).tanh();
    }
    const at::Tensor loss = (x - 0.3).square().mean() + 0.1 * allocator_.orthogonality_penalty();
    optimizer_.zero_grad();
    loss.backward();
    optimizer_.step();
    losses_ += loss.item<double>();
  }

  at::Generator random_;
  at::ScalarType dtype_;
  double dropout_, losses_ = 0;
  std::vector<at::Tensor> weights_;
  std::vector<int64_t> ranks_ = {4, 4};
  std::vector<rankwise::Adapter> adapters_;
  rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer_;
  rankwise::RankAllocator allocator_;
};

/// The results of trainings that take `count` steps, together or one after the other.
std::vector<std::vector<at::Tensor>> trained(bool together, int64_t count, at::ScalarType dtype,
                                             double dropout) {
  std::vector<std::vector<at::Tensor>> results(threads);
  const auto train = [&](int64_t i) {
    at::set_num_threads(1);
    Training training(i, dtype, dropout);
    training.run(count);
    results[i] = training.results();
  };
  std::vector<std::jthread> running;
  for (int64_t i = 0; i < threads; ++i) {
    running.emplace_back(train, i);
    if (!together) running.back().join();
  }
  running.clear();
  return results;
}

TEST(TrainingThreads, HaveTheBitsOfOneAlone) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const auto apart = trained(false, steps, dtype, 0), at_once = trained(true, steps, dtype, 0);
    for (size_t i = 0; i < threads; ++i)
      for (size_t j = 0; j < apart[i].size(); ++j)
        EXPECT_TRUE(at::equal(apart[i][j], at_once[i][j])) << dtype << " " << i << " " << j;
  }
}

TEST(TrainingThreads, ShareTimingsAndRandomNumbers) {
  rankwise::set_cpu_path(rankwise::CpuPath::measured);
  for (const auto& results : trained(true, steps, at::kFloat, 0.1))
    EXPECT_TRUE(results.back().isfinite().all().item<bool>());
  rankwise::set_cpu_path(rankwise::CpuPath::micro_kernel);
}

}  // namespace
