// Which tensors an adapter file must hold: every fault is collected before the one error is thrown.
#include "adapter_layout.h"

#include <rankwise/adapter_key.h>
#include <rankwise/file_error.h>

#include <map>
#include <stdexcept>

#include "message_text.h"

namespace rankwise::io {
namespace {

using Part = AdapterKey::Part;

struct Faults {
  static constexpr size_t shown = 50;
  std::string lines;
  size_t count = 0;

  void add(const std::string& fault) {
    if (++count <= shown) lines += "\n  " + fault;
  }
};

/// The factors of one kind (linear or embedding) of one module.
struct Pair {
  const TensorInfo* A = nullptr;
  const TensorInfo* B = nullptr;
};

struct Module {
  Pair linear;
  Pair embedding;
};

bool is_floating(DType dtype) {
  return dtype == DType::f64 || dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

/// Factors by module; tensors with an unknown name or type go to `faults`.
std::map<std::string, Module> collect(const std::vector<TensorInfo>& tensors, Faults& faults) {
  std::map<std::string, Module> modules;
  for (const TensorInfo& tensor : tensors) {
    const std::optional<AdapterKey> key = parse_adapter_key(tensor.name);
    if (!key) {
      faults.add(
          in_quotes(tensor.name) +
          ": not a tensor of a PEFT LoRA adapter (base_model.model.<module>.lora_A.weight, ...)");
      continue;
    }
    if (!is_floating(tensor.dtype)) {
      faults.add(in_quotes(tensor.name) + ": dtype must be F64, F32, F16 or BF16, got " +
                 std::string(dtype_name(tensor.dtype)));
    }
    if (key->part == Part::saved) continue;
    Module& module = modules[key->module];
    if (key->part == Part::lora_A) module.linear.A = &tensor;
    if (key->part == Part::lora_B) module.linear.B = &tensor;
    if (key->part == Part::embedding_A) module.embedding.A = &tensor;
    if (key->part == Part::embedding_B) module.embedding.B = &tensor;
  }
  return modules;
}

void check_factor(const TensorInfo* tensor, const std::string& name, size_t rank_axis, int64_t rank,
                  const std::string& wanted, Faults& faults) {
  if (!tensor) {
    faults.add(in_quotes(name) + ": missing");
  } else if (tensor->shape.size() != 2 || tensor->shape[rank_axis] != rank) {
    faults.add(in_quotes(name) + ": must be " + wanted + ", got " + shape_text(tensor->shape));
  }
}

void check_module(const std::string& name, const Module& module, const AdapterConfig& config,
                  Faults& faults) {
  const bool linear = module.linear.A || module.linear.B;
  if (linear && (module.embedding.A || module.embedding.B)) {
    faults.add(in_quotes(name) + ": has both lora_A/lora_B and lora_embedding_A/B");
    return;
  }
  int64_t rank = 0;
  try {
    rank = config.rank_of(name);
  } catch (const std::invalid_argument& error) {
    faults.add(in_quotes(name) + ": rank_pattern: " + error.what());
    return;
  }
  const std::string r = std::to_string(rank);
  const auto key = [&](Part part) { return to_string({name, part, ""}); };
  if (linear) {
    check_factor(module.linear.A, key(Part::lora_A), 0, rank, "[" + r + ", in]", faults);
    check_factor(module.linear.B, key(Part::lora_B), 1, rank, "[out, " + r + "]", faults);
  } else {
    check_factor(module.embedding.A, key(Part::embedding_A), 0, rank, "[" + r + ", num_embeddings]",
                 faults);
    check_factor(module.embedding.B, key(Part::embedding_B), 1, rank, "[embedding_dim, " + r + "]",
                 faults);
  }
}

}  // namespace

void check_adapter_layout(const std::vector<TensorInfo>& tensors, const AdapterConfig& config,
                          const std::string& file) {
  Faults faults;
  const std::map<std::string, Module> modules = collect(tensors, faults);
  for (const auto& [name, module] : modules) check_module(name, module, config, faults);
  if (modules.empty()) faults.add("no LoRA factors (lora_A.weight and lora_B.weight)");
  if (faults.count == 0) return;
  if (faults.count > Faults::shown) {
    faults.lines += "\n  and " + std::to_string(faults.count - Faults::shown) + " more";
  }
  throw FileError(file + ": not a LoRA adapter as its configuration describes it:" + faults.lines);
}

std::vector<std::string> adapted_modules(const std::vector<TensorInfo>& tensors) {
  Faults ignored;
  std::vector<std::string> names;
  for (const auto& [name, module] : collect(tensors, ignored)) names.push_back(name);
  return names;
}

}  // namespace rankwise::io
