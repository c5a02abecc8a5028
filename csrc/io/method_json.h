// The fields of adapter_config.json in which LoRA and AdaLoRA differ: ranks, alpha, patterns,
// allocation. Torch-free.
#pragma once

#include <rankwise/adapter_config.h>

#include <map>
#include <string>

#include "json_fields.h"

namespace rankwise::io {

/// Members of a JSON object, sorted; the items of the values keep their order.
using JsonMembers = std::map<std::string, nlohmann::ordered_json>;

/// Reads the fields of the method that config.peft_type names. Throws FileError for wrong types.
void read_method(const JsonFields& fields, AdapterConfig& config);

/// The fields that read_method reads.
JsonMembers method_members(const AdapterConfig& config);

}  // namespace rankwise::io
