// The adapters of a tree of modules: as allocators and optimizers want them, and switched by name.
#include <c10/util/StringUtil.h>
#include <rankwise/module_adapters.h>
#include <rankwise/rank_allocator.h>
#include <rankwise/spectral_allocator.h>

#include <algorithm>
#include <set>
#include <stdexcept>

namespace rankwise {
namespace {

using Layers = std::vector<std::pair<std::string, std::shared_ptr<nn::Adapted>>>;

// Those that an allocator can prune: with lora_E.
std::vector<Adapter> triplets_of(torch::nn::Module& model) {
  std::vector<Adapter> adapters = adapters_of(model);
  std::erase_if(adapters, [](const Adapter& adapter) { return !adapter.lora_E.defined(); });
  if (adapters.empty())
    throw std::invalid_argument("RankAllocator: the model has no AdaLoRA layer (AdaLoRALinear)");
  return adapters;
}

// Those whose rank an allocator can change by their singular directions: without lora_E.
std::vector<Adapter> pairs_of(torch::nn::Module& model) {
  std::vector<Adapter> adapters = adapters_of(model);
  std::erase_if(adapters, [](const Adapter& adapter) { return adapter.lora_E.defined(); });
  if (adapters.empty())
    throw std::invalid_argument("SpectralAllocator: the model has no LoRA layer (LoRALinear)");
  return adapters;
}

std::vector<std::string> names_in(const Layers& layers) {
  std::vector<std::string> names;
  for (const auto& [path, layer] : layers) {
    for (const std::string& name : layer->adapter_names()) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  }
  return names;
}

void check_known(const char* operation, const Layers& layers, const std::string& name) {
  for (const auto& [path, layer] : layers)
    if (layer->has_adapter(name)) return;
  throw std::invalid_argument(
      c10::str(operation, ": adapters are [", c10::Join(", ", names_in(layers)), "], got ", name));
}

void check_unmerged(const char* operation, const Layers& layers) {
  for (const auto& [path, layer] : layers)
    TORCH_CHECK(!layer->merged(), operation, ": ", path, " is merged; call unmerge() first");
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
    if (!layer->adapter()) continue;
    const auto set_rank = [weak = std::weak_ptr(layer), A = layer->lora_A](int64_t rank) {
      if (const auto alive = weak.lock()) alive->set_rank_of(A, rank);
    };
    const auto rank_now = [weak = std::weak_ptr(layer), A = layer->lora_A]() -> int64_t {
      const auto alive = weak.lock();
      return alive ? alive->rank_of(A) : -1;
    };
    const nn::HeldAdapter held = layer->held_adapter(*layer->adapter());
    adapters.push_back({path, held.lora_A, held.lora_B, held.lora_E, held.rank, set_rank, rank_now,
                        held.directions, held.scaling()});
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

std::vector<std::string> adapter_names(torch::nn::Module& model) {
  return names_in(adapted_layers(model));
}

void add_adapter(torch::nn::Module& model, const std::string& name,
                 const nn::AdapterOptions& options) {
  const auto layers = adapted_layers(model);
  if (layers.empty()) throw std::invalid_argument("add_adapter: the model has no adapted layer");
  std::vector<nn::HeldAdapter> adapters;
  for (const auto& [path, layer] : layers) {
    layer->check_new_name(name);
    adapters.push_back(layer->new_adapter(options.settings()));
  }
  for (size_t i = 0; i < layers.size(); ++i) layers[i].second->add_adapter(name, adapters[i]);
}

void activate_adapter(torch::nn::Module& model, const std::optional<std::string>& name) {
  const auto layers = adapted_layers(model);
  if (name) check_known("activate_adapter", layers, *name);
  check_unmerged("activate_adapter", layers);
  for (const auto& [path, layer] : layers) layer->activate_adapter(name);
}

void delete_adapter(torch::nn::Module& model, const std::string& name) {
  const auto layers = adapted_layers(model);
  check_known("delete_adapter", layers, name);
  check_unmerged("delete_adapter", layers);
  for (const auto& [path, layer] : layers)
    if (layer->has_adapter(name)) layer->delete_adapter(name);
}

RankAllocator::RankAllocator(torch::nn::Module& model, const AdaLoRAOptions& options)
    : RankAllocator(triplets_of(model), options) {
  for (const auto& [path, layer] : adapted_layers(model))
    if (layer->lora_E.defined()) layer->set_allocation(options.settings());
}

SpectralAllocator::SpectralAllocator(torch::nn::Module& model, const SpectralOptions& options)
    : SpectralAllocator(pairs_of(model), options) {}

}  // namespace rankwise
