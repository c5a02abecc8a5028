// save_adapter, load_adapter and export_lora for trees of modules, over the file layer.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <rankwise/adapter_fold.h>
#include <rankwise/module_adapters.h>

#include <cmath>
#include <set>
#include <stdexcept>

#include "folder_config.h"

namespace rankwise {
namespace {

using Part = AdapterKey::Part;

// A factor, its name in the file, and the dimension its directions lie along.
struct Slot {
  std::string key;
  at::Tensor factor;
  int64_t dim;

  at::Tensor directions(int64_t first, int64_t count) const {
    return factor.narrow(dim, first, count);
  }
  std::vector<int64_t> shape(int64_t rank) const {
    std::vector<int64_t> sizes = factor.sizes().vec();
    sizes[dim] = rank;
    return sizes;
  }
};

std::vector<Slot> slots_of(const std::string& path, const nn::Adapted& layer) {
  const bool triplets = layer.lora_E.defined();
  const auto key = [&](Part linear, Part embedding, Part triplet) {
    const Part part = triplets ? triplet : layer.embedding() ? embedding : linear;
    return to_string({path, part, ""});
  };
  std::vector<Slot> slots = {
      {key(Part::lora_A, Part::embedding_A, Part::triplet_A), layer.lora_A.detach(), 0},
      {key(Part::lora_B, Part::embedding_B, Part::triplet_B), layer.lora_B.detach(), 1}};
  if (triplets) slots.push_back({to_string({path, Part::triplet_E, ""}), layer.lora_E.detach(), 0});
  return slots;
}

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

// Compares a file with the layers and collects what does not fit.
class FitCheck {
 public:
  explicit FitCheck(const AdapterFile& file) : file_(file) {}

  void layer(const std::string& path, const nn::Adapted& layer) {
    const int64_t rank = file_.config.rank_of(path);
    if (rank > layer.capacity()) {
      fault(path, c10::str("rank must be at most the layer's capacity ", layer.capacity(), ", got ",
                           rank));
    }
    const double scaling = file_.config.scaling(path);  // of AdaLoRA stored rounded
    if (std::abs(scaling - layer.scaling()) > 1e-9 * std::abs(layer.scaling()))
      fault(path, c10::str("scaling must be ", layer.scaling(), ", got ", scaling));
    for (const Slot& slot : slots_of(path, layer)) tensor(slot, rank);
  }

  void finish(const std::filesystem::path& directory) {
    for (const auto& [key, tensor] : file_.tensors) {
      if (!expected_.contains(key)) fault(key, "the model's layers have no place for it");
    }
    if (faults_.empty()) return;
    throw io::FileError("load_adapter: " + directory.string() +
                        " does not fit the model:" + faults_);
  }

 private:
  void tensor(const Slot& slot, int64_t rank) {
    expected_.insert(slot.key);
    const auto it = file_.tensors.find(slot.key);
    if (it == file_.tensors.end()) return fault(slot.key, "missing in the file");
    const std::vector<int64_t> wanted = slot.shape(rank);
    const at::ScalarType dtype = slot.factor.scalar_type(), stored = it->second.scalar_type();
    if (it->second.sizes() != wanted) {
      fault(slot.key, c10::str("must be ", at::IntArrayRef(wanted), ", got ", it->second.sizes()));
    } else if (c10::promoteTypes(dtype, stored) != dtype) {
      fault(slot.key, c10::str(stored, " would be rounded to the layer's ", dtype));
    }
  }

  void fault(const std::string& what, const std::string& why) {
    faults_ += "\n  " + what + ": " + why;
  }

  const AdapterFile& file_;
  std::set<std::string> expected_;
  std::string faults_;
};

}  // namespace

void save_adapter(torch::nn::Module& model, const std::filesystem::path& directory) {
  Layers layers = layers_of("save_adapter", model);
  std::erase_if(layers, [](const auto& item) {
    return item.second->rank() == 0 && !item.second->lora_E.defined();
  });
  if (layers.empty())
    throw std::invalid_argument("save_adapter: every layer has rank 0; there is nothing to save");
  AdapterFile file{.config = folder_config(layers), .tensors = {}, .metadata = {}};
  for (const auto& [path, layer] : layers) {
    for (const Slot& slot : slots_of(path, *layer))
      file.tensors.emplace(slot.key, slot.directions(0, layer->rank()));
  }
  write_adapter(directory, file);
}

void load_adapter(torch::nn::Module& model, const std::filesystem::path& directory) {
  Layers layers = layers_of("load_adapter", model);
  for (const auto& [path, layer] : layers)
    TORCH_CHECK(!layer->merged(), "load_adapter: ", path, " is merged; call unmerge() first");
  const AdapterFile file = read_adapter(directory);
  std::erase_if(layers, [&](const auto& item) {
    const auto& [path, layer] = item;
    return layer->rank() == 0 && !file.tensors.contains(slots_of(path, *layer).front().key);
  });
  FitCheck check(file);
  for (const auto& [path, layer] : layers) check.layer(path, *layer);
  check.finish(directory);

  const at::NoGradGuard no_grad;
  for (const auto& [path, layer] : layers) {
    const int64_t rank = file.config.rank_of(path);
    for (const Slot& slot : slots_of(path, *layer)) {
      slot.directions(0, rank).copy_(file.tensors.at(slot.key));
      slot.directions(rank, layer->capacity() - rank).zero_();
    }
    layer->set_rank(rank);
  }
}

void export_lora(torch::nn::Module& model, const std::filesystem::path& directory) {
  std::vector<AdapterUpdate> updates;
  for (const auto& [path, layer] : layers_of("export_lora", model)) {
    const std::vector<Slot> slots = slots_of(path, *layer);
    const auto active = [&](size_t i) {
      return i < slots.size() ? slots[i].directions(0, layer->rank()) : at::Tensor();
    };
    updates.push_back(
        {path, active(0), active(1), active(2), layer->scaling(), layer->embedding()});
  }
  write_adapter(directory, fold_adapter(updates));
}

}  // namespace rankwise
