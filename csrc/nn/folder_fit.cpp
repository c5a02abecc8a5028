// Slots of a folder's tensors, and the check that all of them fit.
#include "folder_fit.h"

#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <rankwise/tensor_memory.h>

#include <cmath>
#include <optional>

namespace rankwise {

using Part = AdapterKey::Part;

at::Tensor Slot::directions(int64_t first, int64_t count) const {
  return kind_without_memory(factor).empty() ? factor.narrow(dim, first, count) : factor;
}

std::vector<int64_t> Slot::shape(int64_t rank) const {
  std::vector<int64_t> sizes = factor.sizes().vec();
  sizes[dim] = rank;
  return sizes;
}

std::vector<Slot> slots_of(const PlacedAdapter& placed) {
  const auto& [path, adapter, embedding] = placed;
  const bool triplets = adapter.lora_E.defined();
  const auto key = [&, &path = path, &embedding = embedding](Part linear, Part table,
                                                             Part triplet) {
    const Part part = triplets ? triplet : embedding ? table : linear;
    return to_string({path, part, ""});
  };
  std::vector<Slot> slots = {
      {key(Part::lora_A, Part::embedding_A, Part::triplet_A), adapter.lora_A.detach(), 0},
      {key(Part::lora_B, Part::embedding_B, Part::triplet_B), adapter.lora_B.detach(), 1}};
  if (triplets)
    slots.push_back({to_string({path, Part::triplet_E, ""}), adapter.lora_E.detach(), 0});
  return slots;
}

FitCheck::FitCheck(const AdapterFile& file, const torch::nn::Module& model)
    : file_(file), settings_(file.config), parameters_(model.named_parameters()) {}

void FitCheck::adapter(const PlacedAdapter& placed) {
  const auto& [path, adapter, embedding] = placed;
  const int64_t rank = settings_.rank_of(path);
  if (rank > adapter.capacity()) {
    fault(path, c10::str("rank must be at most the layer's capacity ", adapter.capacity(), ", got ",
                         rank));
  }
  const double scaling = settings_.scaling(path);  // of AdaLoRA stored rounded
  if (std::abs(scaling - adapter.scaling()) > 1e-9 * std::abs(adapter.scaling()))
    fault(path, c10::str("scaling must be ", adapter.scaling(), ", got ", scaling));
  for (const Slot& slot : slots_of(placed)) tensor(slot, rank);
}

void FitCheck::finish(const std::filesystem::path& directory) {
  for (const auto& [key, tensor] : file_.tensors) {
    if (!expected_.contains(key)) surplus(key, tensor);
  }
  if (faults_.empty()) return;
  throw io::FileError("load_adapter: " + directory.string() + " does not fit the model:" + faults_);
}

// PEFT also writes the weights of embeddings, which may be the model's own: nothing to do then.
void FitCheck::surplus(const std::string& key, const at::Tensor& stored) {
  const at::Tensor* base = base_of(key);
  if (!base) return fault(key, "the model's layers have no place for it");
  const std::string kind = kind_without_memory(*base);
  if (!kind.empty()) {
    fault(key, "the layer's must be dense, with data, got " + kind);
  } else if (base->sizes() != stored.sizes()) {
    fault(key, c10::str("must be ", base->sizes(), ", got ", stored.sizes()));
  } else if (!stored.to(base->options()).equal(*base)) {
    fault(key, "differs from the model's own, and trees in C++ keep the base that they have");
  }
}

const at::Tensor* FitCheck::base_of(const std::string& key) const {
  const std::optional<AdapterKey> parsed = parse_adapter_key(key);
  if (!parsed || parsed->part != Part::saved) return nullptr;
  const std::string &module = parsed->module, inner = ".base_layer";
  if (const at::Tensor* base = parameters_.find(module + "." + parsed->parameter)) return base;
  if (!module.ends_with(inner)) return nullptr;
  const std::string adapted = module.substr(0, module.size() - inner.size());
  return parameters_.find(adapted + "." + parsed->parameter);
}

void FitCheck::tensor(const Slot& slot, int64_t rank) {
  expected_.insert(slot.key);
  const auto it = file_.tensors.find(slot.key);
  if (it == file_.tensors.end()) return fault(slot.key, "missing in the file");
  const std::string kind = kind_without_memory(slot.factor);
  if (!kind.empty()) return fault(slot.key, "the layer's must be dense, with data, got " + kind);
  if (has_overlap(slot.factor))
    return fault(slot.key, "the layer's has elements that share memory");
  const std::vector<int64_t> wanted = slot.shape(rank);
  const at::ScalarType dtype = slot.factor.scalar_type(), stored = it->second.scalar_type();
  if (it->second.sizes() != wanted) {
    fault(slot.key, c10::str("must be ", at::IntArrayRef(wanted), ", got ", it->second.sizes()));
  } else if (c10::promoteTypes(dtype, stored) != dtype) {
    fault(slot.key, c10::str(stored, " would be rounded to the layer's ", dtype));
  }
}

void FitCheck::fault(const std::string& what, const std::string& why) {
  faults_ += "\n  " + what + ": " + why;
}

}  // namespace rankwise
