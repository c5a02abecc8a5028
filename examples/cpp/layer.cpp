// One layer: recovers a rank-4 change of a frozen weight from its outputs, in C++ alone.
#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <cstdio>

int main() {
  torch::manual_seed(0);
  const auto weight = torch::randn({32, 64}) / 8;
  const auto change = torch::randn({32, 4}).matmul(torch::randn({4, 64})) / 16;
  auto A = torch::randn({4, 64}).div_(8).requires_grad_();
  auto B = torch::zeros({32, 4}).requires_grad_();
  torch::optim::AdamW optimizer({A, B}, torch::optim::AdamWOptions(2e-2).weight_decay(0));

  double loss_value = 0;
  for (int step = 0; step < 500; ++step) {
    const auto x = torch::randn({128, 64});
    const auto wanted = x.matmul((weight + change).t());
    const auto y =
        rankwise::lora_linear(x, weight, /*bias=*/{}, A, B, /*lora_E=*/{}, /*scaling=*/2.0);
    const auto loss = torch::mse_loss(y, wanted);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    loss_value = loss.item<double>();
  }
  const auto [merged, error, changed] = rankwise::merged_weight(weight, A, B, {}, 2.0);
  const double distance = (merged - weight - change).norm().item<double>();
  std::printf("loss %.2e, distance to the change %.2e of %.2f\n", loss_value, distance,
              change.norm().item<double>());
  return distance < 0.01 * change.norm().item<double>() ? 0 : 1;
}
