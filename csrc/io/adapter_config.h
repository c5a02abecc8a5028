// adapter_config.json of PEFT's LoRA and AdaLoRA, to and from AdapterConfig. Torch-free.
#pragma once

#include <rankwise/adapter_config.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rankwise::io {

constexpr int64_t max_rank = int64_t{1} << 20;
constexpr size_t max_patterns = 16384;
constexpr int64_t max_steps = int64_t{1} << 53;
/// Bytes. AdaLoRA's lists take PEFT 13 bytes per direction and module.
constexpr uint64_t max_config_size = uint64_t{4} << 20;

/// Parses the text of an adapter_config.json. Missing fields take PEFT's defaults, and what makes
/// PEFT compute something else than W0 x + scaling B E A x on the untouched W0 (DoRA, biases,
/// PiSSA-like initialisations that changed the base weight, ...) is refused by name. Fields that
/// PEFT 0.21 does not have are ignored; `unknown` gets those in force (not null, false or empty),
/// each as `"name" = value`. Throws FileError beginning with `file`: field, wanted, got.
AdapterConfig parse_adapter_config(std::string_view text, const std::string& file,
                                   std::vector<std::string>* unknown = nullptr);

/// The text PEFT loads, keys sorted; patterns keep their order. Throws FileError beginning with
/// `file` when check_adapter_config does, when a text is not UTF-8, and when the result exceeds
/// max_config_size.
std::string format_adapter_config(const AdapterConfig& config, const std::string& file);

/// Checks the ranges documented in AdapterConfig. Throws FileError beginning with `file`.
void check_adapter_config(const AdapterConfig& config, const std::string& file);

/// What PEFT refuses in a schedule, naming its field, or nothing: folders with it are not loaded.
std::string allocation_fault(const AllocationSettings& settings);

}  // namespace rankwise::io
