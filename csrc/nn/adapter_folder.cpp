// save_adapter, load_adapter and export_lora for trees of modules, over the file layer.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/StringUtil.h>
#include <rankwise/adapter_fold.h>
#include <rankwise/module_adapters.h>

#include <algorithm>
#include <stdexcept>

#include "folder_config.h"
#include "folder_fit.h"

namespace rankwise {
namespace {

using Layers = std::vector<std::pair<std::string, std::shared_ptr<nn::Adapted>>>;
using Placed = std::vector<PlacedAdapter>;

Layers layers_of(const std::string& owner, torch::nn::Module& model) {
  Layers layers = adapted_layers(model);
  if (layers.empty()) throw std::invalid_argument(owner + ": the model has no adapted layer");
  if (layers.front().first.empty()) {
    throw std::invalid_argument(
        owner +
        ": the model is an adapted layer and must contain it, as files name layers by path");
  }
  return layers;
}

// The adapters of this name, or the active ones.
Placed adapters_named(const Layers& layers, const std::optional<std::string>& name) {
  Placed adapters;
  for (const auto& [path, layer] : layers) {
    const std::optional<std::string>& here = name ? name : layer->adapter();
    if (here && layer->has_adapter(*here))
      adapters.push_back({path, layer->held_adapter(*here), layer->embedding()});
  }
  return adapters;
}

Placed adapters_to_write(const std::string& owner, torch::nn::Module& model,
                         const std::optional<std::string>& name) {
  Placed adapters = adapters_named(layers_of(owner, model), name);
  if (!adapters.empty()) return adapters;
  if (!name) throw std::invalid_argument(owner + ": no adapter is active");
  throw std::invalid_argument(
      c10::str(owner, ": adapters are [", c10::Join(", ", adapter_names(model)), "], got ", *name));
}

// The dtype that the op takes over a base of dtype `base` and that holds `stored` unrounded; else
// the base's, which the check of the tensors then refuses.
at::ScalarType factor_dtype(at::ScalarType stored, at::ScalarType base) {
  const bool narrow = base == at::kBFloat16 || base == at::kHalf;
  if (narrow && c10::promoteTypes(stored, base) == at::kFloat) return at::kFloat;
  return base;
}

std::vector<std::string> target_names_in(torch::nn::Module& model, const Placed& adapters) {
  std::vector<std::string> targets, modules;
  for (const PlacedAdapter& placed : adapters) targets.push_back(placed.path);
  std::string inside;  // an adapted layer's children are no modules of the model's own
  for (const auto& item : model.named_modules(/*name_prefix=*/"", /*include_self=*/false)) {
    if (!inside.empty() && item.key().starts_with(inside)) continue;
    modules.push_back(item.key());
    if (dynamic_cast<nn::Adapted*>(item.value().get())) inside = item.key() + ".";
  }
  return target_names(targets, modules);
}

// New adapters, as the file describes them, for the layers that it names.
Placed adapters_of_file(const Layers& layers, const AdapterFile& file) {
  Placed adapters;
  const ModuleSettings of_file(file.config);
  nn::AdapterSettings nothing;
  nothing.rank = 0;
  for (const auto& [path, layer] : layers) {
    const PlacedAdapter like{path, layer->new_adapter(nothing), layer->embedding()};
    const auto stored = file.tensors.find(slots_of(like).front().key);
    if (stored == file.tensors.end()) continue;
    nn::AdapterSettings settings;
    settings.rank = file.config.peft_type == "ADALORA" ? file.config.rank : of_file.rank_of(path);
    settings.alpha = of_file.alpha_of(path);
    settings.dropout = layer->embedding() ? 0 : file.config.dropout;
    settings.rslora = file.config.rslora;
    settings.allocation = file.config.allocation;
    settings.adapter_dtype =
        factor_dtype(stored->second.scalar_type(), layer->weight.scalar_type());
    adapters.push_back({path, layer->new_adapter(settings), layer->embedding()});
  }
  return adapters;
}

// A folder of another rank than the layer's has its directions in the order in which they were
// made.
void note_first_order(const nn::HeldAdapter& adapter, int64_t rank) {
  if (!adapter.directions || rank == adapter.rank) return;
  adapter.directions->set_order(Directions(adapter.capacity(), rank).order());
}

}  // namespace

void save_adapter(torch::nn::Module& model, const std::filesystem::path& directory,
                  const std::optional<std::string>& name,
                  const std::map<std::string, std::string>& beside) {
  Placed adapters = adapters_to_write("save_adapter", model, name);
  std::erase_if(adapters, [](const PlacedAdapter& placed) {
    return placed.adapter.rank == 0 && !placed.adapter.lora_E.defined();
  });
  if (adapters.empty())
    throw std::invalid_argument("save_adapter: every layer has rank 0; there is nothing to save");
  AdapterFile file{
      .config = folder_config(adapters), .tensors = {}, .metadata = {}, .beside = beside};
  file.config.target_modules = target_names_in(model, adapters);
  for (const PlacedAdapter& placed : adapters) {
    for (const Slot& slot : slots_of(placed))
      file.tensors.emplace(slot.key, slot.directions(0, placed.adapter.rank));
  }
  write_adapter(directory, file);
}

void load_adapter(torch::nn::Module& model, const std::filesystem::path& directory,
                  const std::string& name) {
  const Layers layers = layers_of("load_adapter", model);
  for (const auto& [path, layer] : layers)
    TORCH_CHECK(!layer->merged(), "load_adapter: ", path, " is merged; call unmerge() first");
  const AdapterFile file = read_adapter(directory);
  Placed adapters = adapters_named(layers, name);
  const bool fresh = adapters.empty();
  if (fresh) {
    layers.front().second->check_new_name(name);
    adapters = adapters_of_file(layers, file);
  }
  std::erase_if(adapters, [&](const PlacedAdapter& placed) {
    return placed.adapter.rank == 0 && !file.tensors.contains(slots_of(placed).front().key);
  });
  FitCheck check(file, model);
  for (const PlacedAdapter& placed : adapters) check.adapter(placed);
  check.finish(directory);

  const ModuleSettings of_file(file.config);
  const at::NoGradGuard no_grad;
  for (const PlacedAdapter& placed : adapters) {
    const int64_t rank = of_file.rank_of(placed.path);
    for (const Slot& slot : slots_of(placed)) {
      slot.directions(0, rank).copy_(file.tensors.at(slot.key));
      slot.directions(rank, placed.adapter.capacity() - rank).zero_();
    }
  }
  auto placed = adapters.begin();  // in the order of the layers
  for (const auto& [path, layer] : layers) {
    if (placed == adapters.end() || placed->path != path) continue;
    if (fresh) layer->add_adapter(name, placed->adapter);
    note_first_order(placed->adapter, of_file.rank_of(path));
    layer->set_rank_of(placed->adapter.lora_A, of_file.rank_of(path));
    ++placed;
  }
  activate_adapter(model, name);
  for (const auto& [path, layer] : layers) {
    const bool unknown = layer->has_adapter(name) && !layer->settings().allocation;
    if (unknown) layer->set_allocation(file.config.allocation);
  }
}

AdaLoRAOptions adalora_options(torch::nn::Module& model, const std::optional<std::string>& name) {
  const std::string owner = "adalora_options";
  const Placed adapters = adapters_to_write(owner, model, name);
  int64_t initial_rank = 0;
  for (const auto& [path, adapter, embedding] : adapters) {
    if (!adapter.settings.triplets)
      throw std::invalid_argument(owner + ": " + path + " must have an AdaLoRA adapter, got LoRA");
    initial_rank = std::max(initial_rank, adapter.settings.rank);
  }
  const auto allocation = shared_allocation(adapters);
  if (!allocation) {
    throw std::invalid_argument(
        owner +
        ": the adapter's layers have no schedule in common: no RankAllocator was made for "
        "the model, and no folder loaded that has one; give AdaLoRAOptions");
  }
  const AdaLoRAOptions options(initial_rank, *allocation);
  options.check();
  return options;
}

void export_lora(torch::nn::Module& model, const std::filesystem::path& directory,
                 const std::optional<std::string>& name,
                 const std::map<std::string, std::string>& beside) {
  std::vector<AdapterUpdate> updates;
  for (const PlacedAdapter& placed : adapters_to_write("export_lora", model, name)) {
    const std::vector<Slot> slots = slots_of(placed);
    const auto active = [&](size_t i) {
      return i < slots.size() ? slots[i].directions(0, placed.adapter.rank) : at::Tensor();
    };
    updates.push_back(
        {placed.path, active(0), active(1), active(2), placed.adapter.scaling(), placed.embedding});
  }
  AdapterFile file = fold_adapter(updates);
  file.beside = beside;
  write_adapter(directory, file);
}

}  // namespace rankwise
