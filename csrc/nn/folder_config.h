// adapter_config.json for the adapters of a module tree.
#pragma once

#include <rankwise/adapted.h>
#include <rankwise/adapter_config.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace rankwise {

using Layers = std::vector<std::pair<std::string, std::shared_ptr<nn::Adapted>>>;

/// What PEFT's files say of these layers, of which there is at least one. Throws
/// std::invalid_argument, beginning with save_adapter, when they cannot say it.
AdapterConfig folder_config(const Layers& layers);

}  // namespace rankwise
