// AdaptedModule: parameters, clone, moves and archives of an adapted layer.
#include <rankwise/nn.h>

#include <string>

#include "archived_directions.h"

namespace rankwise::nn {
namespace {

// Child modules are not called as the adapters, which may be called as a parameter.
std::string child_name(const std::string& adapter) {
  return "adapter_" + adapter;
}

}  // namespace

template <class Derived>
std::vector<std::pair<const char*, at::Tensor*>> AdaptedModule<Derived>::tensors() {
  return {{"weight", &weight}, {"lora_A", &lora_A}, {"lora_B", &lora_B}, {"lora_E", &lora_E}};
}

template <class Derived>
void AdaptedModule<Derived>::register_tensors() {
  for (const auto& [name, tensor] : tensors())
    this->register_parameter(name, *tensor, tensor->defined() && tensor->requires_grad());
}

template <class Derived>
void AdaptedModule<Derived>::reset() {
  for (const auto& [name, tensor] : tensors()) {
    if (!tensor->defined()) continue;
    const bool trainable = tensor->requires_grad();
    *tensor = at::empty_like(tensor->detach()).requires_grad_(trainable);
  }
  register_tensors();
  separate_directions();
  for (auto& [name, stored] : waiting_) {
    stored = StoredAdapter(HeldAdapter());  // clone() then assigns it a copy of the other's
    add_child(name, stored);
  }
}

template <class Derived>
std::shared_ptr<torch::nn::Module> AdaptedModule<Derived>::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = torch::nn::Cloneable<Derived>::clone(device);
  if (merged()) {
    const torch::NoGradGuard no_grad;
    static_cast<Derived&>(*copy).base_ = base_.to(device.value_or(base_.device())).clone();
  }
  return copy;
}

template <class Derived>
void AdaptedModule<Derived>::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  torch::nn::Module::to(device, dtype, non_blocking);
  if (merged()) base_.set_data(base_.to(device, dtype, non_blocking));
}

template <class Derived>
void AdaptedModule<Derived>::to(torch::Dtype dtype, bool non_blocking) {
  torch::nn::Module::to(dtype, non_blocking);
  if (merged()) base_.set_data(base_.to(dtype, non_blocking));
}

template <class Derived>
void AdaptedModule<Derived>::to(torch::Device device, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
  if (merged()) base_.set_data(base_.to(device, non_blocking));
}

template <class Derived>
void AdaptedModule<Derived>::save(torch::serialize::OutputArchive& archive) const {
  check_unmerged("save");
  torch::nn::Module::save(archive);
  save_directions(archive, active());
}

template <class Derived>
void AdaptedModule<Derived>::load(torch::serialize::InputArchive& archive) {
  check_unmerged("load");
  const auto arrangement = read_directions(archive, active());
  torch::nn::Module::load(archive);
  if (arrangement) set_directions(arrangement->first, arrangement->second);
}

template <class Derived>
void AdaptedModule<Derived>::replace_tensors() {
  for (const auto& [name, tensor] : tensors()) this->parameters_[name] = *tensor;
}

template <class Derived>
void AdaptedModule<Derived>::add_child(const std::string& name, const StoredAdapter& adapter) {
  this->register_module(child_name(name), adapter)->train(this->is_training());
}

template <class Derived>
void AdaptedModule<Derived>::remove_child(const std::string& name) {
  this->unregister_module(child_name(name));
}

template class AdaptedModule<LoRALinearImpl>;
template class AdaptedModule<AdaLoRALinearImpl>;
template class AdaptedModule<LoRAEmbeddingImpl>;

}  // namespace rankwise::nn
