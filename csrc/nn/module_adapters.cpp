// The adapters of a tree of modules, as allocators and optimizers want them.
#include <rankwise/module_adapters.h>
#include <rankwise/rank_allocator.h>

#include <algorithm>
#include <set>
#include <stdexcept>

namespace rankwise {
namespace {

// Those that an allocator can prune: with lora_E.
std::vector<Adapter> triplets_of(torch::nn::Module& model) {
  std::vector<Adapter> adapters = adapters_of(model);
  std::erase_if(adapters, [](const Adapter& adapter) { return !adapter.lora_E.defined(); });
  if (adapters.empty())
    throw std::invalid_argument("RankAllocator: the model has no AdaLoRA layer (AdaLoRALinear)");
  return adapters;
}

}  // namespace

std::vector<std::pair<std::string, std::shared_ptr<nn::Adapted>>> adapted_layers(
    torch::nn::Module& model) {
  std::vector<std::pair<std::string, std::shared_ptr<nn::Adapted>>> layers;
  std::set<std::shared_ptr<nn::Adapted>> seen;
  const auto add = [&](const std::string& path, const std::shared_ptr<torch::nn::Module>& module) {
    auto layer = std::dynamic_pointer_cast<nn::Adapted>(module);
    if (layer && seen.insert(layer).second) layers.emplace_back(path, std::move(layer));
  };
  if (dynamic_cast<nn::Adapted*>(&model)) add("", model.shared_from_this());
  const auto modules = model.named_modules(/*name_prefix=*/"", /*include_self=*/false);
  for (const auto& item : modules) add(item.key(), item.value());
  return layers;
}

std::vector<Adapter> adapters_of(torch::nn::Module& model) {
  std::vector<Adapter> adapters;
  for (const auto& [path, layer] : adapted_layers(model)) {
    const auto set_rank = [weak = std::weak_ptr(layer)](int64_t rank) {
      if (const auto alive = weak.lock()) alive->set_rank(rank);
    };
    adapters.push_back(
        {path, layer->lora_A, layer->lora_B, layer->lora_E, layer->rank(), set_rank});
  }
  return adapters;
}

void freeze_base(torch::nn::Module& model) {
  for (at::Tensor& parameter : model.parameters()) parameter.requires_grad_(false);
  for (const Adapter& adapter : adapters_of(model)) {
    for (const at::Tensor& factor : {adapter.lora_A, adapter.lora_B, adapter.lora_E})
      if (factor.defined()) factor.requires_grad_();
  }
}

RankAllocator::RankAllocator(torch::nn::Module& model, const AdaLoRAOptions& options)
    : RankAllocator(triplets_of(model), options) {}

}  // namespace rankwise
