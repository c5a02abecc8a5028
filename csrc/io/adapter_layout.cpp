// Which tensors an adapter file must hold: every fault is collected before the one error is thrown.
#include "adapter_layout.h"

#include <rankwise/adapter_key.h>
#include <rankwise/file_error.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <stdexcept>

#include "message_text.h"
#include "module_pattern.h"

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

/// A factor's part, and what its rows and columns are: "rank", a number, or a size of the model's.
struct Factor {
  Part part;
  std::string rows;
  std::string columns;
};

/// The factors of a module that belong together, and the method that has them.
struct Kind {
  const char* names;
  const char* peft_type;
  std::vector<Factor> factors;
};

const std::array<Kind, 3> kinds = {{
    {"lora_A.weight and lora_B.weight",
     "LORA",
     {{Part::lora_A, "rank", "in"}, {Part::lora_B, "out", "rank"}}},
    {"lora_embedding_A and lora_embedding_B",
     "LORA",
     {{Part::embedding_A, "rank", "num_embeddings"}, {Part::embedding_B, "embedding_dim", "rank"}}},
    {"lora_A, lora_B and lora_E",
     "ADALORA",
     {{Part::triplet_A, "rank", "in"},
      {Part::triplet_B, "out", "rank"},
      {Part::triplet_E, "rank", "1"}}},
}};

using Module = std::map<Part, const TensorInfo*>;

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
    if (key->part != Part::saved) modules[key->module][key->part] = &tensor;
  }
  return modules;
}

/// `wanted`: a number, or the name of any size.
bool fits(int64_t size, const std::string& wanted) {
  return !std::isdigit(static_cast<unsigned char>(wanted[0])) || std::to_string(size) == wanted;
}

void check_factor(const std::string& name, const TensorInfo* tensor, const Factor& factor,
                  int64_t rank, Faults& faults) {
  const auto size = [&](const std::string& axis) {
    return axis == "rank" ? std::to_string(rank) : axis;
  };
  const std::string rows = size(factor.rows);
  const std::string columns = size(factor.columns);
  if (!tensor) {
    faults.add(in_quotes(name) + ": missing");
  } else if (tensor->shape.size() != 2 || !fits(tensor->shape[0], rows) ||
             !fits(tensor->shape[1], columns)) {
    faults.add(in_quotes(name) + ": must be [" + rows + ", " + columns + "], got " +
               shape_text(tensor->shape));
  }
}

bool has_any(const Module& module, const Kind& kind) {
  return std::any_of(kind.factors.begin(), kind.factors.end(),
                     [&](const Factor& factor) { return module.contains(factor.part); });
}

void check_module(const std::string& name, const Module& module, const AdapterConfig& config,
                  const ModuleSettings& settings, Faults& faults) {
  int64_t rank = 0;
  try {
    rank = settings.rank_of(name);
  } catch (const std::invalid_argument& error) {
    faults.add(in_quotes(name) + ": rank_pattern: " + error.what());
    return;
  }
  const Kind* found = nullptr;
  for (const Kind& kind : kinds) {
    if (!has_any(module, kind)) continue;
    if (config.peft_type != kind.peft_type) {
      faults.add(in_quotes(name) + ": " + config.peft_type + " has no " + kind.names);
    } else if (found) {
      faults.add(in_quotes(name) + ": has both " + found->names + " and " + kind.names);
    } else {
      found = &kind;
      for (const Factor& factor : kind.factors) {
        const auto tensor = module.find(factor.part);
        check_factor(to_string({name, factor.part, ""}),
                     tensor == module.end() ? nullptr : tensor->second, factor, rank, faults);
      }
    }
  }
}

/// What matching a name with all patterns costs; those that cannot be matched are named elsewhere.
size_t patterns_cost(const AdapterConfig& config) {
  size_t cost = 0;
  const auto add = [&](const auto& patterns) {
    for (const auto& [pattern, value] : patterns) {
      try {
        cost += pattern_cost(pattern);
      } catch (const std::invalid_argument&) {
      }
    }
  };
  add(config.rank_pattern);
  add(config.alpha_pattern);
  return cost;
}

/// Every module is matched with every pattern: many modules times complicated ones could take
/// hours.
void check_matching_work(const std::map<std::string, Module>& modules, const AdapterConfig& config,
                         const std::string& file) {
  constexpr size_t most = size_t{1} << 30;  // some ten seconds
  const size_t cost = patterns_cost(config);
  size_t letters = 0;
  for (const auto& [name, module] : modules) letters += name.size();
  if (cost == 0 || letters <= most / cost) return;
  throw FileError(file +
                  ": the regular expressions of rank_pattern and alpha_pattern must be fewer "
                  "or simpler for " +
                  std::to_string(modules.size()) + " modules");
}

}  // namespace

void check_adapter_layout(const std::vector<TensorInfo>& tensors, const AdapterConfig& config,
                          const std::string& file) {
  Faults faults;
  const std::map<std::string, Module> modules = collect(tensors, faults);
  check_matching_work(modules, config, file);
  const ModuleSettings settings(config);
  for (const auto& [name, module] : modules) check_module(name, module, config, settings, faults);
  for (const auto& [name, kept] : config.kept_directions) {
    if (!modules.contains(name)) {
      faults.add("rank_pattern " + in_quotes(name + ".lora_E") + ": there is no such module");
    }
  }
  if (modules.empty()) faults.add("no LoRA factors (lora_A and lora_B)");
  if (faults.count == 0) return;
  if (faults.count > Faults::shown) {
    faults.lines += "\n  and " + std::to_string(faults.count - Faults::shown) + " more";
  }
  throw FileError(file + ": not the adapter that its configuration describes:" + faults.lines);
}

std::vector<std::string> adapted_modules(const std::vector<TensorInfo>& tensors) {
  Faults ignored;
  std::vector<std::string> names;
  for (const auto& [name, module] : collect(tensors, ignored)) names.push_back(name);
  return names;
}

}  // namespace rankwise::io
