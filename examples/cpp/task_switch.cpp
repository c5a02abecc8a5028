// Task switch: one base reads upright digits; two LoRA adapters over it read rotated and mirrored
// ones, and are swapped by name. A swap exchanges pointers: no weight is copied, merged or written.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "digits.h"

namespace {

constexpr int64_t base_steps = 400, steps = 300;

struct Task {
  const char* name;
  digits::Images train, test;
};

digits::Images rotated(const digits::Images& images) {
  return {images.pixels.rot90(1, {1, 2}).contiguous(), images.labels};
}

digits::Images mirrored(const digits::Images& images) {
  return {images.pixels.flip(2), images.labels};
}

void learn(digits::Classifier& model, const Task& task) {
  rankwise::add_adapter(*model, task.name, rankwise::nn::AdapterOptions().rank(8).alpha(16));
  rankwise::activate_adapter(*model, std::string(task.name));
  torch::optim::AdamW optimizer(digits::trainable(*model), torch::optim::AdamWOptions(1e-2));
  digits::train(model, task.train, optimizer, steps, task.name);
}

/// The median time of a swap between two adapters, in microseconds.
double swap_time(digits::Classifier& model, const Task& one, const Task& other) {
  using clock = std::chrono::steady_clock;
  std::vector<double> times;
  for (int i = 0; i < 1000; ++i) {
    const std::string name = i % 2 == 0 ? one.name : other.name;
    const auto start = clock::now();
    rankwise::activate_adapter(*model, name);
    times.push_back(std::chrono::duration<double, std::micro>(clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + 500, times.end());
  return times[500];
}

/// Prints how well each task is read, and returns the share of `own`.
double report(digits::Classifier& model, const std::vector<Task>& tasks, const Task& own) {
  std::printf("%-10s", own.name);
  double share = 0;
  for (const Task& task : tasks) {
    const double percent = digits::accuracy(model, task.test);
    if (task.name == own.name) share = percent;
    std::printf("  %8.1f %%", percent);
  }
  std::printf("\n");
  return share;
}

int run(const char* path) {
  torch::manual_seed(0);
  const digits::Data data = digits::load(path);
  const std::vector<Task> tasks = {{"upright", data.train, data.test},
                                   {"rotated", rotated(data.train), rotated(data.test)},
                                   {"mirrored", mirrored(data.train), mirrored(data.test)}};
  digits::Classifier model;
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(3e-3));
  digits::train(model, data.train, optimizer, base_steps, "training the base");
  const torch::OrderedDict<std::string, at::Tensor> base = model->named_parameters();
  torch::OrderedDict<std::string, at::Tensor> bits;
  for (const auto& item : base) bits.insert(item.key(), item.value().clone());

  model->adapt<rankwise::nn::LoRALinear>(rankwise::nn::AdapterOptions());
  rankwise::delete_adapter(*model, "default");
  for (size_t i = 1; i < tasks.size(); ++i) learn(model, tasks[i]);

  std::printf("%-10s", "adapter");
  for (const Task& task : tasks) std::printf("  %10s", task.name);
  std::printf("\n");
  double lowest = 100;
  for (const Task& task : tasks) {
    const bool is_base = task.name == tasks[0].name;
    rankwise::activate_adapter(*model,
                               is_base ? std::nullopt : std::optional<std::string>(task.name));
    lowest = std::min(lowest, report(model, tasks, task));
  }
  std::printf("a swap: %.1f us\n", swap_time(model, tasks[1], tasks[2]));
  const bool same = std::all_of(base.begin(), base.end(), [&](const auto& item) {
    return model->named_parameters()[item.key()].is_same(item.value()) &&
           item.value().equal(bits[item.key()]);
  });
  std::printf("base: %s\n", same ? "every bit as before" : "CHANGED");
  return same && lowest > 85 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s DIGITS (as export_digits.py writes it)\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
