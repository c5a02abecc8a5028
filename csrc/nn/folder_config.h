// adapter_config.json for the adapters of a module tree.
#pragma once

#include <rankwise/adapter_config.h>
#include <rankwise/stored_adapter.h>

#include <optional>
#include <string>
#include <vector>

namespace rankwise {

/// One layer's adapter, and the layer's path in the tree.
struct PlacedAdapter {
  std::string path;
  nn::HeldAdapter adapter;
  bool embedding = false;
};

/// The schedule that all these adapters have, or none.
std::optional<AllocationSettings> shared_allocation(const std::vector<PlacedAdapter>& adapters);

/// What PEFT's files say of these adapters, of which there is at least one. Throws
/// std::invalid_argument, beginning with save_adapter, when they cannot say it.
AdapterConfig folder_config(const std::vector<PlacedAdapter>& adapters);

}  // namespace rankwise
