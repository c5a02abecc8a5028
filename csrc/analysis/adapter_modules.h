// What an adapter folder holds, by name.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/adapter_fold.h>

#include <map>
#include <set>
#include <string>
#include <vector>

namespace rankwise::analysis {

using Modules = std::map<std::string, AdapterUpdate>;
using Tensors = std::map<std::string, at::Tensor>;

inline Modules modules_of(const AdapterFile& adapter) {
  Modules modules;
  for (const AdapterUpdate& update : updates_of(adapter)) modules.emplace(update.module, update);
  return modules;
}

// The tensors that are not factors, by key.
inline Tensors saved_in(const AdapterFile& adapter) {
  Tensors saved;
  for (const auto& [name, tensor] : adapter.tensors) {
    const auto key = parse_adapter_key(name);
    if (key && key->part == AdapterKey::Part::saved) saved.emplace(name, tensor);
  }
  return saved;
}

// The names that are in any of them.
template <class Value>
std::set<std::string> names_in(const std::vector<std::map<std::string, Value>>& all) {
  std::set<std::string> names;
  for (const auto& one : all)
    for (const auto& [name, value] : one) names.insert(name);
  return names;
}

}  // namespace rankwise::analysis
