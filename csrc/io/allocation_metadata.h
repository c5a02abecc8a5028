// What adapter_config.json cannot hold of a schedule, in the safetensors metadata: budget unit,
// min_rank and shrink, which PEFT does not have and ignores there. Torch-free.
#pragma once

#include <rankwise/allocation_settings.h>

#include <map>
#include <optional>
#include <string>

namespace rankwise::io {

/// Puts them there where they are not the defaults.
void store_allocation(const std::optional<AllocationSettings>& allocation,
                      std::map<std::string, std::string>& metadata);

/// Takes them from there into the schedule, if there is one. Throws FileError naming `file` when
/// they are not what store_allocation writes.
void take_allocation(std::map<std::string, std::string>& metadata,
                     std::optional<AllocationSettings>& allocation, const std::string& file);

}  // namespace rankwise::io
