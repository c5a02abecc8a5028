// AdaLoRA in C++ alone: two frozen layers whose wanted changes have ranks 1 and 5. Twelve
// directions are trained; the allocator, which may keep six, has to find out where they belong.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cstdio>

namespace {

constexpr int64_t in = 64, out = 32, initial_rank = 6;

struct Layer {
  at::Tensor weight, change;
  rankwise::Adapter adapter;

  Layer(const char* name, int64_t true_rank)
      : weight(torch::randn({out, in}) / 8),
        change(torch::randn({out, true_rank}).matmul(torch::randn({true_rank, in})) / 8),
        adapter{name,
                torch::randn({initial_rank, in}).mul_(0.1).requires_grad_(),
                torch::randn({out, initial_rank}).mul_(0.1).requires_grad_(),
                torch::zeros({initial_rank, 1}).requires_grad_(),
                initial_rank,
                [this](int64_t rank) { adapter.rank = rank; }} {}

  at::Tensor loss() const {
    const auto x = torch::randn({128, in});
    const auto y =
        rankwise::lora_linear(x, weight, /*bias=*/{}, adapter.lora_A, adapter.lora_B,
                              adapter.lora_E, /*scaling=*/2.0, /*dropout_p=*/0.0, adapter.rank);
    return torch::mse_loss(y, x.matmul((weight + change).t()));
  }
};

}  // namespace

int main() {
  torch::manual_seed(0);
  constexpr int64_t steps = 600;
  Layer narrow("narrow", 1), wide("wide", 5);
  std::vector<at::Tensor> factors;
  for (const auto& adapter : {narrow.adapter, wide.adapter})
    factors.insert(factors.end(), {adapter.lora_A, adapter.lora_B, adapter.lora_E});

  const auto options = rankwise::AdaLoRAOptions()
                           .initial_rank(initial_rank)
                           .target_rank(3)
                           .total_steps(steps)
                           .warmup_steps(100)
                           .final_steps(200);
  rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer(
      factors, torch::optim::AdamWOptions(2e-2).weight_decay(0));
  rankwise::RankAllocator allocator({narrow.adapter, wide.adapter}, options);
  allocator.attach(optimizer);

  double loss_value = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const auto loss = narrow.loss() + wide.loss();
    optimizer.zero_grad();
    (loss + 1e-4 * allocator.orthogonality_penalty()).backward();
    optimizer.step();
    loss_value = loss.item<double>();
  }
  for (const auto& [name, rank] : allocator.ranks())
    std::printf("%s: rank %lld of %lld\n", name.c_str(), static_cast<long long>(rank),
                static_cast<long long>(initial_rank));
  std::printf("loss %.2e\n", loss_value);
  return narrow.adapter.rank == 1 && wide.adapter.rank == 5 ? 0 : 1;
}
