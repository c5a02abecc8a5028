// The training of test_parity.py in C++: prints each step's loss, then what the allocator chose.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cstdio>
#include <optional>
#include <string>

namespace {

constexpr int64_t in = 16, hidden = 24, out = 8, batch = 32, steps = 100;

template <class Layer>
struct Net : torch::nn::Module {
  static rankwise::nn::LoRALinearOptions options(int64_t inputs, int64_t outputs) {
    return rankwise::nn::LoRALinearOptions(inputs, outputs).rank(6).alpha(12).dropout(0.1);
  }
  Layer up = register_module("up", Layer(options(in, hidden)));
  Layer down = register_module("down", Layer(options(hidden, out)));

  at::Tensor forward(const at::Tensor& x) { return down(up(x).tanh()); }
};

std::vector<at::Tensor> trainable(const torch::nn::Module& model) {
  std::vector<at::Tensor> parameters = model.parameters();
  std::erase_if(parameters, [](const at::Tensor& tensor) { return !tensor.requires_grad(); });
  return parameters;
}

void print_choices(const rankwise::RankAllocator& allocator) {
  for (const rankwise::Allocation& entry : allocator.history()) {
    std::printf("allocation %ld %ld", static_cast<long>(entry.step),
                static_cast<long>(entry.budget));
    for (const int64_t rank : entry.ranks) std::printf(" %ld", static_cast<long>(rank));
    std::printf("\n");
  }
  for (const auto& [name, kept] : allocator.pattern()) {
    std::printf("pattern %s", name.c_str());
    for (int64_t i = 0; i < kept.size(0); ++i) std::printf(" %d", kept[i].item<bool>());
    std::printf("\n");
  }
}

template <class Layer>
void train(torch::Dtype dtype) {
  torch::manual_seed(7);
  Net<Layer> model;
  model.to(dtype);
  const auto teacher = torch::randn({out, in}, dtype) / 4;
  rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer(trainable(model),
                                                                torch::optim::AdamWOptions(1e-2));
  std::optional<rankwise::RankAllocator> allocator;
  if constexpr (std::is_same_v<Layer, rankwise::nn::AdaLoRALinear>) {
    allocator.emplace(model, rankwise::AdaLoRAOptions()
                                 .initial_rank(6)
                                 .target_rank(3)
                                 .total_steps(steps)
                                 .warmup_steps(10)
                                 .final_steps(30)
                                 .allocation_interval(5));
    allocator->attach(optimizer);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const auto x = torch::randn({batch, in}, dtype);
    auto loss = torch::mse_loss(model.forward(x), x.matmul(teacher.t()).tanh());
    if (allocator) loss = loss + 0.1 * allocator->orthogonality_penalty();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    std::printf("loss %.17g\n", loss.template item<double>());
  }
  if (allocator) print_choices(*allocator);
  for (const auto& adapter : rankwise::adapters_of(model))
    std::printf("rank %s %ld\n", adapter.name.c_str(), static_cast<long>(adapter.rank));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string method = argc == 3 ? argv[1] : "", dtype = argc == 3 ? argv[2] : "";
  if ((method != "lora" && method != "adalora") || (dtype != "float32" && dtype != "float64")) {
    std::fprintf(stderr, "usage: %s lora|adalora float32|float64\n", argv[0]);
    return 2;
  }
  const auto type = dtype == "float32" ? torch::kFloat : torch::kDouble;
  if (method == "lora") {
    train<rankwise::nn::LoRALinear>(type);
  } else {
    train<rankwise::nn::AdaLoRALinear>(type);
  }
}
