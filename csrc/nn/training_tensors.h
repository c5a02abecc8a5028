// What a training changes of a tree of modules, as named tensors: factors, all else that is trained
// or that an optimizer holds, buffers, and how the adapters' directions lie.
#pragma once

#include <rankwise/adapted.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace rankwise {

using NamedTensors = std::map<std::string, at::Tensor>;
/// What does not fit, in sentences.
using Faults = std::vector<std::string>;

/// Names are those of torch::nn::Module, each tensor has one; parameters that only the optimizer
/// has are called `outside.N`. Nothing is copied.
class TrainingTensors {
 public:
  /// Throws std::invalid_argument without an adapted layer, and c10::Error when one is merged.
  TrainingTensors(const std::string& owner, torch::nn::Module& model,
                  const torch::optim::Optimizer& optimizer);

  /// Of a parameter that the optimizer holds.
  const std::string& name_of(const at::Tensor& parameter) const;
  /// Which adapters there are, and which are active, by layer.
  std::map<std::string, std::string> adapters() const;
  bool on_cuda() const;

  NamedTensors state() const;
  void check(const NamedTensors& stored, Faults& faults) const;
  /// Takes a state() back in which check() finds nothing.
  void load(const NamedTensors& stored) const;

 private:
  struct Held {
    std::string entry;  // of its directions
    std::shared_ptr<nn::Adapted> layer;
    nn::HeldAdapter adapter;
  };
  void add(const std::string& name, const at::Tensor& tensor);

  NamedTensors tensors_;
  std::map<const c10::TensorImpl*, std::string> names_;
  std::vector<std::pair<std::string, std::shared_ptr<nn::Adapted>>> layers_;
  std::vector<Held> held_;
};

}  // namespace rankwise
