// Modules: trains AdaLoRA layers over a frozen model, prunes them, and saves PEFT folders that
// Python loads: DIRECTORY as AdaLoRA, PLAIN_DIRECTORY as LoRA. Prints the outputs for ones.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cstdio>

namespace {

constexpr int64_t in = 16, hidden = 24, out = 4, initial_rank = 6;

struct Net : torch::nn::Module {
  rankwise::nn::AdaLoRALinear up{
      rankwise::nn::LoRALinearOptions(in, hidden).rank(initial_rank).alpha(12)};
  rankwise::nn::AdaLoRALinear down{
      rankwise::nn::LoRALinearOptions(hidden, out).rank(initial_rank).alpha(12)};

  Net() {
    register_module("up", up);
    register_module("down", down);
  }

  at::Tensor forward(const at::Tensor& x) { return down(up(x).tanh()); }
};

void train(Net& model) {
  std::vector<at::Tensor> factors;
  for (const at::Tensor& parameter : model.parameters())
    if (parameter.requires_grad()) factors.push_back(parameter);
  rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer(factors,
                                                                torch::optim::AdamWOptions(1e-2));
  rankwise::RankAllocator allocator(model, rankwise::AdaLoRAOptions()
                                               .initial_rank(initial_rank)
                                               .target_rank(3)
                                               .total_steps(100)
                                               .warmup_steps(10)
                                               .final_steps(20)
                                               .allocation_interval(5));
  allocator.attach(optimizer);
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    const auto x = torch::randn({32, in});
    const auto loss = torch::mse_loss(model.forward(x), x.narrow(1, 0, out));
    (loss + 0.1 * allocator.orthogonality_penalty()).backward();
    optimizer.step();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s DIRECTORY PLAIN_DIRECTORY\n", argv[0]);
    return 2;
  }
  try {
    torch::manual_seed(0);
    Net model;
    train(model);
    rankwise::save_adapter(model, argv[1]);
    rankwise::export_lora(model, argv[2]);
    const torch::NoGradGuard no_grad;
    const auto y = model.forward(torch::ones({1, in}));
    for (int64_t i = 0; i < out; ++i) std::printf("%.9g\n", y[0][i].item<double>());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
