// fold_adapter: scaling and lora_E into lora_B, all modules to one rank.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/zeros_like.h>
#include <rankwise/adapter_fold.h>
#include <rankwise/ops.h>
#include <rankwise/tensor_memory.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "adapter_config.h"
#include "adapter_layout.h"
#include "adapter_tensors.h"
#include "message_text.h"

namespace rankwise {
namespace {

using Part = AdapterKey::Part;

[[noreturn]] void fail(const std::string& reason) {
  throw std::invalid_argument("fold_adapter: " + reason);
}

void check_shape(const AdapterUpdate& update, const char* factor, const at::Tensor& tensor,
                 int64_t rows, int64_t columns) {
  const auto text = [](int64_t size) { return size < 0 ? "any" : std::to_string(size); };
  const auto fits = [](int64_t size, int64_t wanted) { return wanted < 0 || size == wanted; };
  const std::string kind = kind_without_memory(tensor);
  if (tensor.defined() && !kind.empty()) {
    fail(std::string(factor) + " of " + io::in_quotes(update.module) +
         " must be dense, with data, got " + kind + "; put a plain tensor in its place");
  }
  if (tensor.defined() && tensor.is_floating_point() && tensor.dim() == 2 &&
      fits(tensor.size(0), rows) && fits(tensor.size(1), columns)) {
    return;
  }
  fail(std::string(factor) + " of " + io::in_quotes(update.module) + " must be floating [" +
       text(rows) + ", " + text(columns) + "], got " +
       (tensor.defined() ? tensor.toString() + " " + c10::str(tensor.sizes()) : "none"));
}

/// Rank of an update whose factors fit together.
int64_t checked_rank(const AdapterUpdate& update) {
  check_shape(update, "lora_A", update.lora_A, -1, -1);
  const int64_t rank = update.lora_A.size(0);
  check_shape(update, "lora_B", update.lora_B, -1, rank);
  if (update.lora_E.defined()) check_shape(update, "lora_E", update.lora_E, rank, 1);
  return rank;
}

/// round(scaling * lora_B diag(lora_E)): what the update adds to a zero weight when lora_A is the
/// identity.
at::Tensor folded_B(const AdapterUpdate& update) {
  const at::Tensor& E = update.lora_E;
  const at::ScalarType dtype = E.defined()
                                   ? c10::promoteTypes(update.lora_B.scalar_type(), E.scalar_type())
                                   : update.lora_B.scalar_type();
  const at::Tensor B = update.lora_B.detach().to(at::kCPU, dtype);
  std::optional<at::Tensor> factors;
  if (E.defined()) factors = E.detach().to(at::kCPU, dtype);
  const auto [folded, error, changed] =
      merged_weight(at::zeros_like(B), at::eye(B.size(1), B.options()), B, factors, update.scaling);
  if (!std::isfinite(error.item<double>())) {
    fail("lora_B of " + io::in_quotes(update.module) + " would not be finite in " +
         c10::toString(dtype) + " with scaling and lora_E in it");
  }
  return folded;
}

/// The settings that folding leaves as they are, over `rank` directions of `modules`.
AdapterConfig folded_config(AdapterConfig config, int64_t rank, std::vector<std::string> modules) {
  AdapterConfig folded;
  folded.rank = rank;
  folded.alpha = static_cast<double>(rank);
  folded.target_modules = std::move(modules);
  folded.dropout = config.dropout;
  folded.fan_in_fan_out = config.fan_in_fan_out;
  folded.modules_to_save = std::move(config.modules_to_save);
  folded.base_model_name_or_path = std::move(config.base_model_name_or_path);
  folded.revision = std::move(config.revision);
  folded.task_type = std::move(config.task_type);
  folded.base_model_class = std::move(config.base_model_class);
  folded.parent_library = std::move(config.parent_library);
  return folded;
}

}  // namespace

std::vector<AdapterUpdate> updates_of(const AdapterFile& adapter) {
  const std::string owner = "updates_of";
  io::check_adapter_config(adapter.config, owner);
  std::vector<io::TensorInfo> infos;
  std::map<std::string, AdapterUpdate> updates;
  for (const auto& [name, tensor] : adapter.tensors) {
    infos.push_back(io::describe(name, tensor, owner));
    const std::optional<AdapterKey> key = parse_adapter_key(name);
    if (!key || key->part == Part::saved) continue;
    AdapterUpdate& update = updates[key->module];
    const Part part = key->part;
    update.embedding = part == Part::embedding_A || part == Part::embedding_B;
    if (part == Part::lora_A || part == Part::embedding_A || part == Part::triplet_A) {
      update.lora_A = tensor;
    } else if (part == Part::triplet_E) {
      update.lora_E = tensor;
    } else {
      update.lora_B = tensor;
    }
  }
  io::check_adapter_layout(infos, adapter.config, owner);
  const ModuleSettings settings(adapter.config);
  std::vector<AdapterUpdate> result;
  for (auto& [module, update] : updates) {
    update.module = module;
    update.scaling = settings.scaling(module);
    result.push_back(std::move(update));
  }
  return result;
}

AdapterFile fold_adapter(const std::vector<AdapterUpdate>& updates, AdapterConfig config) {
  int64_t rank = 0;
  for (const AdapterUpdate& update : updates) rank = std::max(rank, checked_rank(update));
  if (rank == 0) fail("every module has rank 0; there is nothing to write");
  AdapterFile folded;
  std::vector<std::string> modules;
  for (const AdapterUpdate& update : updates) {
    const int64_t missing = rank - update.lora_A.size(0);
    if (missing == rank) continue;
    const Part part_A = update.embedding ? Part::embedding_A : Part::lora_A;
    const Part part_B = update.embedding ? Part::embedding_B : Part::lora_B;
    const at::Tensor A = update.lora_A.detach().to(at::kCPU);
    folded.tensors[to_string({update.module, part_A, ""})] =
        at::constant_pad_nd(A, {0, 0, 0, missing});
    folded.tensors[to_string({update.module, part_B, ""})] =
        at::constant_pad_nd(folded_B(update), {0, missing});
    modules.push_back(update.module);
  }
  std::sort(modules.begin(), modules.end());
  const auto twice = std::adjacent_find(modules.begin(), modules.end());
  if (twice != modules.end()) fail("module " + io::in_quotes(*twice) + " is given twice");
  folded.config = folded_config(std::move(config), rank, std::move(modules));
  return folded;
}

AdapterFile fold_adapter(const AdapterFile& adapter) {
  AdapterFile folded = fold_adapter(updates_of(adapter), adapter.config);
  for (const auto& [name, tensor] : adapter.tensors) {
    const std::optional<AdapterKey> key = parse_adapter_key(name);
    if (key && key->part == Part::saved) folded.tensors.emplace(name, tensor);
  }
  return folded;
}

}  // namespace rankwise
