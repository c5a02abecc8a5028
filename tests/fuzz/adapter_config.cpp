// Fuzzes adapter_config.json: what is read is written and read again as the same.
#include "io/adapter_config.h"

#include <rankwise/file_error.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "check.h"

namespace {

using rankwise::AdapterConfig;
using namespace rankwise::io;

std::optional<AdapterConfig> parsed(std::string_view text) {
  try {
    return parse_adapter_config(text, "F");
  } catch (const FileError& error) {
    check(std::string_view(error.what()).starts_with("F: "), "an error names its file");
    return std::nullopt;
  }
}

void look_up(const AdapterConfig& config) {
  for (const char* module : {"q", "layers.0.self_attn.q_proj", "encoder.layer.11.output.dense"}) {
    try {
      const int64_t rank = config.rank_of(module);
      check(rank >= 0 && rank <= max_rank, "ranks are within their bounds");
      config.scaling(module);
    } catch (const std::invalid_argument&) {
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto config = parsed({reinterpret_cast<const char*>(data), size});
  if (!config) return 0;
  look_up(*config);
  const std::string text = format_adapter_config(*config, "F");
  const auto again = parsed(text);
  check(again == config, "what is written is read");
  check(format_adapter_config(*again, "F") == text, "the same configuration gives the same bytes");
  return 0;
}
