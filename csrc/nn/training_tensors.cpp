// TrainingTensors: which tensors of a tree a training changes, and how they are put back.
#include "training_tensors.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/StringUtil.h>
#include <rankwise/module_adapters.h>

#include <algorithm>
#include <optional>
#include <set>
#include <stdexcept>

namespace rankwise {
namespace {

using Impls = std::set<const c10::TensorImpl*>;

// The order in which directions lie, and the rank; also of adapters whose directions nobody moves.
Directions directions_of(const nn::HeldAdapter& adapter) {
  return adapter.directions ? *adapter.directions : Directions(adapter.capacity(), adapter.rank);
}

std::string kind_of(const at::Tensor& tensor) {
  return c10::str(tensor.scalar_type(), " ", tensor.sizes());
}

}  // namespace

TrainingTensors::TrainingTensors(const std::string& owner, torch::nn::Module& model,
                                 const torch::optim::Optimizer& optimizer)
    : layers_(adapted_layers(model)) {
  if (layers_.empty()) throw std::invalid_argument(owner + ": the model has no adapted layer");
  Impls changing;
  for (const auto& [path, layer] : layers_) {
    TORCH_CHECK(!layer->merged(), owner, ": ", path, " is merged; call unmerge() first");
    for (const std::string& name : layer->adapter_names()) {
      const std::string child = layer->adapter() == name ? "" : ".adapter_" + name;
      held_.push_back({path + child + ".lora_directions", layer, layer->held_adapter(name)});
      for (const at::Tensor& factor : held_.back().adapter.factors())
        if (factor.defined()) changing.insert(factor.unsafeGetTensorImpl());
    }
  }
  for (const auto& group : optimizer.param_groups())
    for (const at::Tensor& parameter : group.params())
      changing.insert(parameter.unsafeGetTensorImpl());
  for (const auto& item : model.named_parameters()) {
    const at::Tensor& parameter = item.value();
    if (parameter.requires_grad() || changing.contains(parameter.unsafeGetTensorImpl()))
      add(item.key(), parameter);
  }
  for (const auto& item : model.named_buffers()) add(item.key(), item.value());
  int64_t outside = 0;
  for (const auto& group : optimizer.param_groups())
    for (const at::Tensor& parameter : group.params())
      if (!names_.contains(parameter.unsafeGetTensorImpl()))
        add("outside." + std::to_string(outside++), parameter);
}

void TrainingTensors::add(const std::string& name, const at::Tensor& tensor) {
  if (names_.emplace(tensor.unsafeGetTensorImpl(), name).second) tensors_.emplace(name, tensor);
}

const std::string& TrainingTensors::name_of(const at::Tensor& parameter) const {
  return names_.at(parameter.unsafeGetTensorImpl());
}

std::map<std::string, std::string> TrainingTensors::adapters() const {
  std::map<std::string, std::string> result;
  for (const auto& [path, layer] : layers_)
    result[path] = c10::str(layer->adapter().value_or("none"), " of ",
                            c10::Join(", ", layer->adapter_names()));
  return result;
}

bool TrainingTensors::on_cuda() const {
  return std::ranges::any_of(tensors_, [](const auto& item) { return item.second.is_cuda(); });
}

NamedTensors TrainingTensors::state() const {
  NamedTensors state = tensors_;
  for (const auto& [entry, layer, adapter] : held_)
    state[entry] = directions_of(adapter).state(adapter.rank);
  return state;
}

void TrainingTensors::check(const NamedTensors& stored, Faults& faults) const {
  const NamedTensors wanted = state();
  for (const auto& [name, tensor] : stored)
    if (!wanted.contains(name))
      faults.push_back(name + ": the model has no such tensor that trains");
  for (const auto& [name, tensor] : wanted) {
    const auto found = stored.find(name);
    if (found == stored.end()) {
      faults.push_back(name + ": missing in the checkpoint");
    } else if (kind_of(found->second) != kind_of(tensor)) {
      faults.push_back(name + ": must be " + kind_of(tensor) + ", got " + kind_of(found->second));
    }
  }
  for (const auto& [entry, layer, adapter] : held_) {
    if (!stored.contains(entry)) continue;
    try {
      directions_of(adapter).read(stored.at(entry));
    } catch (const std::invalid_argument& error) {
      faults.push_back(entry + ": " + error.what());
    }
  }
}

void TrainingTensors::load(const NamedTensors& stored) const {
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : tensors_) tensor.copy_(stored.at(name));
  for (const auto& [entry, layer, adapter] : held_) {
    auto [order, rank] = directions_of(adapter).read(stored.at(entry));
    if (adapter.directions) adapter.directions->set_order(std::move(order));
    layer->set_rank_of(adapter.lora_A, rank);
  }
}

}  // namespace rankwise
