// The digits' data, model and training: what digits_adalora and task_switch share.
#include "digits.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace digits {
namespace {

constexpr int64_t rows = 8, columns = 8, classes = 10;
constexpr int64_t width = 64, hidden = 128, heads = 4, batch = 64;

/// One line on a terminal, rewritten as training goes on; silent elsewhere.
class Progress {
 public:
  Progress(const char* title, int64_t steps)
      : title_(title), steps_(steps), terminal_(isatty(STDERR_FILENO) == 1) {}
  ~Progress() {
    if (terminal_) std::fputs("\r\033[K", stderr);
  }
  void show(int64_t step, const at::Tensor& loss) const {
    if (!terminal_ || (step % 10 != 0 && step != steps_)) return;
    std::fprintf(stderr, "\r%s: step %ld of %ld, loss %.3f", title_, static_cast<long>(step),
                 static_cast<long>(steps_), loss.item<double>());
  }

 private:
  const char* title_;
  int64_t steps_;
  bool terminal_;
};

}  // namespace

Data load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto tensors = torch::pickle_load(bytes).toGenericDict();
  const auto tensor = [&](const char* name) { return tensors.at(name).toTensor(); };
  return {{tensor("train_pixels"), tensor("train_labels")},
          {tensor("test_pixels"), tensor("test_labels")}};
}

void write(const std::string& path, const torch::OrderedDict<std::string, at::Tensor>& tensors) {
  std::vector<c10::IValue> pairs;  // tuples: a Dict would need more trust than tensors in Python
  for (const auto& item : tensors)
    pairs.push_back(c10::ivalue::Tuple::create(item.key(), item.value().detach()));
  const std::vector<char> bytes = torch::pickle_save(c10::ivalue::Tuple::create(std::move(pairs)));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

ClassifierImpl::ClassifierImpl() {
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    linear_.insert(name, torch::nn::AnyModule(register_module(name, torch::nn::Linear(in, out))));
  };
  const auto norm = [&](const char* name) {
    return register_module(name, torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
  };
  position_ = register_parameter("position", torch::randn({rows, width}) / 8);
  linear("embed", columns, width);
  before_attention_ = norm("before_attention");
  for (const char* name : {"query", "key", "value", "output"}) linear(name, width, width);
  before_mlp_ = norm("before_mlp");
  linear("up", width, hidden);
  linear("down", hidden, width);
  before_head_ = norm("before_head");
  linear("head", width, classes);
}

at::Tensor ClassifierImpl::attention(const at::Tensor& x) {
  const auto split = [&](const char* name) {  // [images, heads, tokens, width / heads]
    return apply(name, x).unflatten(-1, {heads, width / heads}).transpose(1, 2);
  };
  const auto mixed = at::scaled_dot_product_attention(split("query"), split("key"), split("value"));
  return apply("output", mixed.transpose(1, 2).flatten(-2));
}

at::Tensor ClassifierImpl::forward(const at::Tensor& pixels) {
  at::Tensor x = apply("embed", pixels) + position_;
  x = x + attention(before_attention_(x));
  x = x + apply("down", at::gelu(apply("up", before_mlp_(x))));
  return apply("head", before_head_(x).mean(1));
}

std::vector<at::Tensor> trainable(const torch::nn::Module& model) {
  std::vector<at::Tensor> parameters = model.parameters();
  std::erase_if(parameters, [](const at::Tensor& tensor) { return !tensor.requires_grad(); });
  return parameters;
}

void train(Classifier& model, const Images& images, torch::optim::Optimizer& optimizer,
           int64_t steps, const char* title, const std::function<at::Tensor()>& penalty) {
  const Progress progress(title, steps);
  model->train();
  for (int64_t step = 1; step <= steps; ++step) {
    const auto chosen = torch::randint(images.labels.size(0), {batch}, torch::kLong);
    const auto loss = torch::nn::functional::cross_entropy(
        model(images.pixels.index_select(0, chosen)), images.labels.index_select(0, chosen));
    optimizer.zero_grad();
    (penalty ? loss + penalty() : loss).backward();
    optimizer.step();
    progress.show(step, loss);
  }
}

at::Tensor predict(Classifier& model, const Images& images) {
  const torch::NoGradGuard no_grad;
  model->eval();
  return model(images.pixels);
}

double accuracy(Classifier& model, const Images& images) {
  const auto right = predict(model, images).argmax(1).eq(images.labels);
  return 100 * right.to(torch::kDouble).mean().item<double>();
}

}  // namespace digits
