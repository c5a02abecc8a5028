// Which tensors an adapter file must hold, from their names, types and shapes alone. Torch-free.
#pragma once

#include <rankwise/adapter_config.h>

#include <string>
#include <vector>

#include "safetensors.h"

namespace rankwise::io {

/// Checks the tensors of an adapter: known names, floating types, for each module the factors of
/// one kind that the method has (lora_A [rank, in], lora_B [out, rank], in AdaLoRA lora_E [rank,
/// 1]) with rank = config.rank_of(module), and no kept_directions of other modules. Throws one
/// FileError beginning with `file` that lists all that is wrong (the first 50 and a count).
void check_adapter_layout(const std::vector<TensorInfo>& tensors, const AdapterConfig& config,
                          const std::string& file);

/// Paths of the modules that have LoRA factors, sorted.
std::vector<std::string> adapted_modules(const std::vector<TensorInfo>& tensors);

}  // namespace rankwise::io
