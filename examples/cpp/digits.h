// Handwritten digits of 8 x 8 pixels, a transformer encoder block that reads them, and its
// training.
#pragma once

#include <rankwise/rankwise.h>
#include <torch/torch.h>

#include <functional>
#include <string>
#include <vector>

namespace digits {

struct Images {
  at::Tensor pixels;  // [images, 8, 8], 0 .. 1
  at::Tensor labels;  // [images], 0 .. 9

  /// Those of the digits first .. last.
  Images of(int64_t first, int64_t last) const {
    const at::Tensor wanted = labels.ge(first).logical_and(labels.le(last));
    return {pixels.index({wanted}), labels.index({wanted})};
  }
};

struct Data {
  Images train, test;
};

/// Reads what export_digits.py wrote.
Data load(const std::string& path);

/// Writes (name, tensor) pairs; in Python dict(torch.load(path)).
void write(const std::string& path, const torch::OrderedDict<std::string, at::Tensor>& tensors);

/// The eight rows of an image are the tokens: one encoder block, mean over tokens, linear head.
class ClassifierImpl : public torch::nn::Module {
 public:
  ClassifierImpl();

  /// Logits [images, 10] of pixels [images, 8, 8].
  at::Tensor forward(const at::Tensor& pixels);

  /// Puts an adapted layer around every linear layer, over the same weights, and freezes the rest.
  template <class Layer>
  void adapt(const rankwise::nn::AdapterOptions& options) {
    for (auto& item : linear_) {
      item.value() = torch::nn::AnyModule(Layer(item.value().get<torch::nn::Linear>(), options));
      replace_module(item.key(), item.value().ptr());
    }
    rankwise::freeze_base(*this);
  }

 private:
  at::Tensor apply(const char* name, const at::Tensor& x) { return linear_[name].forward(x); }
  at::Tensor attention(const at::Tensor& x);

  torch::OrderedDict<std::string, torch::nn::AnyModule> linear_;
  torch::nn::LayerNorm before_attention_{nullptr}, before_mlp_{nullptr}, before_head_{nullptr};
  at::Tensor position_;
};
TORCH_MODULE(Classifier);

/// The parameters that require gradients.
std::vector<at::Tensor> trainable(const torch::nn::Module& model);

/// Trains on random batches, with a progress line where stderr is a terminal. `penalty` is added to
/// the loss.
void train(Classifier& model, const Images& images, torch::optim::Optimizer& optimizer,
           int64_t steps, const char* title, const std::function<at::Tensor()>& penalty = {});

/// Logits in eval mode.
at::Tensor predict(Classifier& model, const Images& images);

/// The share of images, in percent, whose largest logit is the right one.
double accuracy(Classifier& model, const Images& images);

}  // namespace digits
