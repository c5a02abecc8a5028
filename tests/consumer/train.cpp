// Trains an AdaLoRA model for 100 steps, prunes it to half of its ranks and saves it as a PEFT
// folder. Prints the final ranks, then the model's output for the first eight tokens.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cstdio>

namespace {

namespace rw = rankwise::nn;

struct Net : torch::nn::Module {
  torch::nn::Embedding tokens = register_module("tokens", torch::nn::Embedding(8, 16));
  rw::AdaLoRALinear up =
      register_module("up", rw::AdaLoRALinear(rw::LoRALinearOptions(16, 24).rank(6).alpha(12)));
  rw::AdaLoRALinear down =
      register_module("down", rw::AdaLoRALinear(rw::LoRALinearOptions(24, 4).rank(6).alpha(12)));

  at::Tensor forward(const at::Tensor& ids) { return down(up(tokens(ids)).tanh()); }
};

std::vector<at::Tensor> trainable(const Net& model) {
  std::vector<at::Tensor> parameters = model.parameters();
  std::erase_if(parameters, [](const at::Tensor& p) { return !p.requires_grad(); });
  return parameters;
}

void train(Net& model) {
  rankwise::freeze_base(model);
  rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer(trainable(model), 1e-2);
  rankwise::RankAllocator allocator(model, rankwise::AdaLoRAOptions()
                                               .initial_rank(6)
                                               .target_rank(3)
                                               .total_steps(100)
                                               .warmup_steps(10)
                                               .final_steps(20)
                                               .allocation_interval(5));
  allocator.attach(optimizer);
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    const auto ids = torch::randint(8, {32});
    const auto loss = torch::cross_entropy_loss(model.forward(ids), ids % 4);
    (loss + 0.1 * allocator.orthogonality_penalty()).backward();
    optimizer.step();
  }
  for (const auto& [name, rank] : allocator.ranks())
    std::printf("%s %lld\n", name.c_str(), static_cast<long long>(rank));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
    return 2;
  }
  torch::manual_seed(0);
  Net model;
  train(model);
  rankwise::save_adapter(model, argv[1]);
  const torch::NoGradGuard no_grad;
  const at::Tensor y = model.forward(torch::arange(8)).flatten();
  for (int64_t i = 0; i < y.numel(); ++i) std::printf("%.9g\n", y[i].item<double>());
}
