// Ranks that rise above the initial one, in C++ alone: four frozen layers whose wanted changes have
// ranks 2, 20, 30 and 3. Each begins with six directions; the allocator moves them to where they
// count, at a constant number of parameters. Beside it the same training with six each to the end.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cstdio>

namespace {

constexpr int64_t side = 64, initial_rank = 6, steps = 800;
constexpr int64_t true_ranks[] = {2, 20, 30, 3};

struct Layers : torch::nn::Module {
  std::vector<rankwise::nn::LoRALinear> layers;
  std::vector<at::Tensor> wanted;  // weights

  Layers() {
    torch::manual_seed(0);
    for (const int64_t rank : true_ranks) {
      const auto options = rankwise::nn::LoRALinearOptions(side, side)
                               .rank(initial_rank)
                               .alpha(2 * initial_rank)
                               .capacity(32)
                               .bias(false);
      layers.push_back(
          register_module("layer_of_" + std::to_string(rank), rankwise::nn::LoRALinear(options)));
      const auto change = torch::randn({side, rank}).matmul(torch::randn({rank, side})) / side;
      wanted.push_back(layers.back()->weight + change);
    }
  }

  at::Tensor loss() {
    const auto x = torch::randn({128, side});
    at::Tensor sum = torch::zeros({});
    for (size_t i = 0; i < layers.size(); ++i)
      sum = sum + torch::mse_loss(layers[i]->forward(x), x.matmul(wanted[i].t()));
    return sum;
  }
};

double train(Layers& model, bool moves) {
  rankwise::freeze_base(model);
  std::vector<at::Tensor> factors;
  for (const rankwise::Adapter& adapter : rankwise::adapters_of(model))
    factors.insert(factors.end(), {adapter.lora_A, adapter.lora_B});
  rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer(
      factors, torch::optim::AdamWOptions(1e-2).weight_decay(0));
  rankwise::SpectralAllocator allocator(model, rankwise::SpectralOptions()
                                                   .total_steps(steps)
                                                   .warmup_steps(50)
                                                   .final_steps(200)
                                                   .allocation_interval(40));
  if (moves) allocator.attach(optimizer);
  double loss_value = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const auto loss = model.loss();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    loss_value = 0.95 * loss_value + 0.05 * loss.item<double>();
  }
  for (const auto& [name, rank] : allocator.ranks())
    std::printf("%s: rank %lld\n", name.c_str(), static_cast<long long>(rank));
  std::printf("loss %.4f, bank %lld\n", loss_value, static_cast<long long>(allocator.bank()));
  return loss_value;
}

}  // namespace

int main() {
  const auto fixed = std::make_shared<Layers>(), moved = std::make_shared<Layers>();
  const double before = train(*fixed, /*moves=*/false), after = train(*moved, /*moves=*/true);
  return after < before ? 0 : 1;
}
