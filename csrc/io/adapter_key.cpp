// AdapterKey: PEFT's tensor names, taken apart and put together.
#include <rankwise/adapter_key.h>

#include <array>
#include <utility>

namespace rankwise {
namespace {

using Part = AdapterKey::Part;

constexpr std::string_view prefix = "base_model.model.";

constexpr std::array<std::pair<Part, std::string_view>, 7> factor_suffixes = {{
    {Part::lora_A, ".lora_A.weight"},
    {Part::lora_B, ".lora_B.weight"},
    {Part::embedding_A, ".lora_embedding_A"},
    {Part::embedding_B, ".lora_embedding_B"},
    {Part::triplet_A, ".lora_A"},
    {Part::triplet_B, ".lora_B"},
    {Part::triplet_E, ".lora_E"},
}};

}  // namespace

std::optional<AdapterKey> parse_adapter_key(std::string_view name) {
  if (!name.starts_with(prefix)) return std::nullopt;
  for (const unsigned char c : name) {
    if (c < 0x20 || c == 0x7F) return std::nullopt;
  }
  name.remove_prefix(prefix.size());
  for (const auto& [part, suffix] : factor_suffixes) {
    if (name.size() > suffix.size() && name.ends_with(suffix)) {
      return AdapterKey{std::string(name.substr(0, name.size() - suffix.size())), part, ""};
    }
  }
  if (name.starts_with("lora_") || name.find(".lora_") != std::string_view::npos) {
    return std::nullopt;
  }
  const size_t dot = name.rfind('.');
  if (dot == std::string_view::npos || dot == 0 || dot + 1 == name.size()) return std::nullopt;
  return AdapterKey{std::string(name.substr(0, dot)), Part::saved,
                    std::string(name.substr(dot + 1))};
}

std::string to_string(const AdapterKey& key) {
  const std::string start = std::string(prefix) + key.module;
  for (const auto& [part, suffix] : factor_suffixes) {
    if (part == key.part) return start + std::string(suffix);
  }
  return start + "." + key.parameter;
}

}  // namespace rankwise
