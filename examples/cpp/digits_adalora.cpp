// Digits: a small transformer that was trained on 0 to 4 learns 5 to 9 through AdaLoRA alone.
// Writes to DIRECTORY: base.pt (the frozen weights), adapter (PEFT's AdaLoRA folder) and logits.pt
// (what the adapted model answers on the test images).
#include <cstdio>
#include <filesystem>

#include "digits.h"

namespace {

constexpr int64_t initial_rank = 8, target_rank = 4, base_steps = 300, steps = 500;

void learn(digits::Classifier& model, const digits::Images& images) {
  model->adapt<rankwise::nn::AdaLoRALinear>(
      rankwise::nn::AdapterOptions().rank(initial_rank).alpha(16));
  rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer(
      digits::trainable(*model), torch::optim::AdamWOptions(1e-2).weight_decay(0));
  rankwise::RankAllocator allocator(*model, rankwise::AdaLoRAOptions()
                                                .initial_rank(initial_rank)
                                                .target_rank(target_rank)
                                                .total_steps(steps)
                                                .warmup_steps(50)
                                                .final_steps(200)
                                                .allocation_interval(5));
  allocator.attach(optimizer);
  digits::train(model, images, optimizer, steps, "adapting to 5 .. 9",
                [&] { return 1e-3 * allocator.orthogonality_penalty(); });
  for (const auto& [name, rank] : allocator.ranks())
    std::printf("%s: rank %ld of %ld\n", name.c_str(), static_cast<long>(rank),
                static_cast<long>(initial_rank));
}

int run(const std::filesystem::path& data_path, const std::filesystem::path& directory) {
  torch::manual_seed(0);
  const digits::Data data = digits::load(data_path);
  const digits::Images known = data.test.of(0, 4), wanted = data.test.of(5, 9);
  digits::Classifier model;
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(3e-3));
  digits::train(model, data.train.of(0, 4), optimizer, base_steps, "training the base on 0 .. 4");
  std::printf("base: %.1f %% of 0 .. 4 right, %.1f %% of 5 .. 9\n", digits::accuracy(model, known),
              digits::accuracy(model, wanted));
  std::filesystem::create_directories(directory);
  digits::write(directory / "base.pt", model->named_parameters());
  const at::Tensor before = digits::predict(model, known);

  learn(model, data.train.of(5, 9));
  const double learned = digits::accuracy(model, wanted);
  std::printf("adapted: %.1f %% of 5 .. 9 right\n", learned);
  rankwise::save_adapter(*model, directory / "adapter");
  digits::write(directory / "logits.pt", {{{"logits", digits::predict(model, data.test)}}});

  rankwise::activate_adapter(*model, {});
  const bool kept = digits::predict(model, known).equal(before);
  std::printf("without the adapter: %.1f %% of 0 .. 4 right, %s\n", digits::accuracy(model, known),
              kept ? "every logit as before" : "but the logits have CHANGED");
  return kept && learned > 90 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s DIGITS DIRECTORY (DIGITS as export_digits.py writes it)\n",
                 argv[0]);
    return 2;
  }
  try {
    return run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
