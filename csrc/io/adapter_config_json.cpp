// adapter_config.json <-> AdapterConfig. Fields: PEFT 0.21, src/peft/tuners/lora/config.py.
#include <rankwise/file_error.h>

#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "adapter_config.h"
#include "bounded_json.h"
#include "message_text.h"

namespace rankwise::io {
namespace {

using Json = nlohmann::json;

/// When a field of LoraConfig is in force.
enum class Active { truthy, not_null };

struct UnsupportedField {
  const char* name;
  Active when;
  const char* reason;
};

constexpr std::array unsupported_fields = {
    UnsupportedField{"use_dora", Active::truthy, "DoRA rescales the adapted weight"},
    UnsupportedField{"lora_bias", Active::truthy, "lora_B has a bias"},
    UnsupportedField{"layer_replication", Active::truthy, "the base model's layers are repeated"},
    UnsupportedField{"target_parameters", Active::truthy, "parameters, not modules, are adapted"},
    UnsupportedField{"trainable_token_indices", Active::truthy, "embedding rows are replaced"},
    UnsupportedField{"use_qalora", Active::truthy, "the input is pooled"},
    UnsupportedField{"alora_invocation_tokens", Active::truthy, "tokens switch the adapter on"},
    UnsupportedField{"megatron_config", Active::truthy, "the layers are Megatron's"},
    UnsupportedField{"ensure_weight_tying", Active::truthy, "adapters share their weights"},
    UnsupportedField{"arrow_config", Active::not_null, "a router mixes adapters"},
    UnsupportedField{"use_bdlora", Active::not_null, "the factors are block-diagonal"},
    UnsupportedField{"kasa_config", Active::not_null, "the base weight is truncated"},
    UnsupportedField{"velora_config", Active::not_null, "the backward pass is compressed"},
    UnsupportedField{"monteclora_config", Active::not_null, "the factors are sampled"},
};

bool truthy(const Json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number()) return value.get<double>() != 0;
  if (value.is_string()) return !value.get_ref<const std::string&>().empty();
  return !value.empty();  // null, array, object
}

/// Typed access to the members of one JSON object.
class Fields {
 public:
  Fields(const JsonObject& object, const std::string& file)
      : object_(object.value), key_order_(object.key_order), file_(file) {}

  [[noreturn]] void fail(const std::string& field, const std::string& wanted,
                         const std::string& got) const {
    throw FileError(file_ + ": " + field + " must be " + wanted + ", got " + got);
  }

  /// The member, or nullptr when it is missing.
  const Json* find_with_null(const char* field) const {
    const auto it = object_.find(field);
    return it == object_.end() ? nullptr : &*it;
  }

  /// The member, or nullptr when it is missing or null.
  const Json* find(const char* field) const {
    const Json* value = find_with_null(field);
    return value && !value->is_null() ? value : nullptr;
  }

  bool boolean(const char* field) const {
    const Json* value = find(field);
    if (value && !value->is_boolean()) fail(field, "a boolean", described(*value));
    return value && value->get<bool>();
  }

  std::string string(const char* field) const {
    const Json* value = find(field);
    return value ? string(field, *value) : std::string();
  }

  std::string string(const std::string& field, const Json& value) const {
    if (!value.is_string()) fail(field, "a string", described(value));
    return value.get<std::string>();
  }

  int64_t integer(const std::string& field, const Json& value) const {
    const bool too_large = value.is_number_unsigned() &&
                           value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()};
    if (!value.is_number_integer() || too_large) fail(field, "an integer", described(value));
    return value.get<int64_t>();
  }

  double number(const std::string& field, const Json& value) const {
    if (!value.is_number()) fail(field, "a number", described(value));
    return value.get<double>();
  }

  std::vector<std::string> strings(const char* field) const {
    std::vector<std::string> result;
    const Json* value = find(field);
    if (value && !value->is_array()) fail(field, "a list of strings", described(*value));
    for (const Json& item : value ? *value : Json::array()) {
      result.push_back(string(std::string("every item of ") + field, item));
    }
    return result;
  }

  /// A list of names, or one string, a regex, kept apart.
  void strings_or_regex(const char* field, std::vector<std::string>& names,
                        std::string& regex) const {
    const Json* value = find(field);
    if (value && value->is_string()) {
      regex = value->get<std::string>();
    } else if (value && !value->is_array()) {
      fail(field, "a list of strings or a string", described(*value));
    } else {
      names = strings(field);
    }
  }

  /// Calls `visit(key, name of the item, item)` for the members of an object, in the order of the
  /// file.
  template <class Visit>
  void members(const char* field, const Visit& visit) const {
    const Json* value = find(field);
    if (!value) return;
    if (!value->is_object()) fail(field, "an object", described(*value));
    const auto order = key_order_.find(field);
    if (order == key_order_.end()) return;
    for (const std::string& key : order->second) {
      visit(key, std::string(field) + " " + in_quotes(key), value->at(key));
    }
  }

 private:
  const Json& object_;
  const std::map<std::string, std::vector<std::string>>& key_order_;
  const std::string& file_;
};

void refuse_unsupported(const Fields& fields, const std::string& file) {
  std::string active;
  for (const auto& [name, when, reason] : unsupported_fields) {
    const Json* value = fields.find(name);
    if (!value || (when == Active::truthy && !truthy(*value))) continue;
    active += std::string(active.empty() ? "" : "; ") + name + " (" + reason + ")";
  }
  if (!active.empty()) throw FileError(file + ": not supported: " + active);
  const Json* bias = fields.find("bias");
  if (bias && *bias != "none") fields.fail("bias", "\"none\"", described(*bias));
}

/// true, false and these leave the base weight alone; PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA changed
/// it before training.
void refuse_changed_base(const Fields& fields) {
  const Json* init = fields.find("init_lora_weights");
  if (!init || init->is_boolean()) return;
  for (const char* harmless : {"gaussian", "eva", "orthogonal", "mica"}) {
    if (*init == harmless) return;
  }
  fields.fail("init_lora_weights",
              "a boolean, \"gaussian\", \"eva\", \"orthogonal\" or \"mica\" (others change the "
              "base weight)",
              described(*init));
}

void read_layers(const Fields& fields, AdapterConfig& config) {
  if (const Json* layers = fields.find("layers_to_transform")) {
    for (const Json& layer : layers->is_array() ? *layers : Json::array({*layers})) {
      config.layers_to_transform.push_back(fields.integer("layers_to_transform", layer));
    }
  }
  const Json* pattern = fields.find("layers_pattern");
  if (pattern && pattern->is_string()) {
    config.layers_pattern = {pattern->get<std::string>()};
  } else {
    config.layers_pattern = fields.strings("layers_pattern");
  }
}

Json or_null(const std::string& text) {
  return text.empty() ? Json() : Json(text);
}

Json or_null(const std::vector<std::string>& names, const std::string& regex = "") {
  return names.empty() ? or_null(regex) : Json(names);
}

/// PEFT declares alpha an integer; a whole number is written as one.
Json whole_or_real(double value) {
  const bool whole = std::abs(value) < 9e15 && value == std::floor(value);
  return whole ? Json(static_cast<int64_t>(value)) : Json(value);
}

}  // namespace

AdapterConfig parse_adapter_config(std::string_view text, const std::string& file) {
  const JsonObject json = parse_json_object(text, file);
  const Fields fields(json, file);
  AdapterConfig config;
  config.peft_type = fields.string("peft_type");
  if (config.peft_type != "LORA") {
    fields.fail("peft_type", "\"LORA\"", in_quotes(config.peft_type));
  }
  refuse_unsupported(fields, file);
  refuse_changed_base(fields);
  if (const Json* value = fields.find_with_null("r")) config.rank = fields.integer("r", *value);
  if (const Json* value = fields.find_with_null("lora_alpha")) {
    config.alpha = fields.number("lora_alpha", *value);
  }
  if (const Json* value = fields.find_with_null("lora_dropout")) {
    config.dropout = fields.number("lora_dropout", *value);
  }
  config.rslora = fields.boolean("use_rslora");
  config.fan_in_fan_out = fields.boolean("fan_in_fan_out");
  fields.strings_or_regex("target_modules", config.target_modules, config.target_modules_regex);
  fields.strings_or_regex("exclude_modules", config.exclude_modules, config.exclude_modules_regex);
  config.modules_to_save = fields.strings("modules_to_save");
  read_layers(fields, config);
  fields.members("rank_pattern", [&](auto& key, auto name, auto& value) {
    config.rank_pattern.emplace_back(key, fields.integer(name, value));
  });
  fields.members("alpha_pattern", [&](auto& key, auto name, auto& value) {
    config.alpha_pattern.emplace_back(key, fields.number(name, value));
  });
  config.base_model_name_or_path = fields.string("base_model_name_or_path");
  config.revision = fields.string("revision");
  config.task_type = fields.string("task_type");
  check_adapter_config(config, file);
  return config;
}

std::string format_adapter_config(const AdapterConfig& config, const std::string& file) {
  check_adapter_config(config, file);
  nlohmann::ordered_json rank_pattern = nlohmann::ordered_json::object();
  auto& ranks = rank_pattern.get_ref<nlohmann::ordered_json::object_t&>();
  for (const auto& [key, value] : config.rank_pattern) ranks.emplace_back(key, value);
  nlohmann::ordered_json alpha_pattern = nlohmann::ordered_json::object();
  auto& alphas = alpha_pattern.get_ref<nlohmann::ordered_json::object_t&>();
  for (const auto& [key, value] : config.alpha_pattern)
    alphas.emplace_back(key, whole_or_real(value));
  const nlohmann::ordered_json json = {
      {"alpha_pattern", alpha_pattern},
      {"base_model_name_or_path", or_null(config.base_model_name_or_path)},
      {"bias", "none"},
      {"exclude_modules", or_null(config.exclude_modules, config.exclude_modules_regex)},
      {"fan_in_fan_out", config.fan_in_fan_out},
      {"inference_mode", true},
      {"init_lora_weights", true},
      {"layers_pattern", or_null(config.layers_pattern)},
      {"layers_to_transform",
       config.layers_to_transform.empty() ? Json() : Json(config.layers_to_transform)},
      {"lora_alpha", whole_or_real(config.alpha)},
      {"lora_dropout", config.dropout},
      {"modules_to_save", or_null(config.modules_to_save)},
      {"peft_type", config.peft_type},
      {"r", config.rank},
      {"rank_pattern", rank_pattern},
      {"revision", or_null(config.revision)},
      {"target_modules", or_null(config.target_modules, config.target_modules_regex)},
      {"task_type", or_null(config.task_type)},
      {"use_rslora", config.rslora},
  };
  std::string text;
  try {
    text = json.dump(2) + "\n";
  } catch (const Json::exception&) {
    throw FileError(file + ": names must be valid UTF-8");
  }
  if (text.size() > max_config_size) {
    throw FileError(file + ": must be at most " + std::to_string(max_config_size) + " bytes, got " +
                    std::to_string(text.size()));
  }
  return text;
}

}  // namespace rankwise::io
