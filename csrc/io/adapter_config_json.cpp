// adapter_config.json <-> AdapterConfig: the fields that LoRA and AdaLoRA share. PEFT 0.21,
// src/peft/tuners/lora/config.py.
#include <rankwise/file_error.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "adapter_config.h"
#include "bounded_json.h"
#include "json_fields.h"
#include "message_text.h"
#include "method_json.h"

namespace rankwise::io {
namespace {

using Json = nlohmann::json;

/// Whose format the files have.
constexpr const char* peft_version = "0.21.2";

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

void refuse_unsupported(const JsonFields& fields, const std::string& file) {
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
void refuse_changed_base(const JsonFields& fields) {
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

/// PEFT's fields without an effect here: about the file, the start of training that is over
/// (refuse_changed_base), Megatron and QA-LoRA, which are refused, and LoRA's that AdaLoRA has too.
constexpr std::array<std::string_view, 11> without_effect = {
    "peft_version",   "inference_mode", "loftq_config",      "eva_config", "corda_config",
    "lora_ga_config", "megatron_core",  "qalora_group_size", "r",          "use_rslora",
    "alpha_pattern"};

std::vector<std::string> unknown_in_force(const JsonFields& fields) {
  std::vector<std::string> unknown;
  fields.not_asked_for([&](const std::string& name, const Json& value) {
    const bool known = std::ranges::find(without_effect, name) != without_effect.end();
    if (!known && (value.is_number() || truthy(value)))
      unknown.push_back(in_quotes(name) + " = " + described(value));
  });
  return unknown;
}

void read_layers(const JsonFields& fields, AdapterConfig& config) {
  if (const Json* layers = fields.find("layers_to_transform")) {
    for (const Json& layer : layers->is_array() ? *layers : Json::array({*layers})) {
      config.layers_to_transform.push_back(fields.to_integer("layers_to_transform", layer));
    }
  }
  const Json* pattern = fields.find("layers_pattern");
  if (pattern && pattern->is_string()) {
    config.layers_pattern = {pattern->get<std::string>()};
  } else {
    config.layers_pattern = fields.strings("layers_pattern");
  }
}

/// Custom models have other mappings, which say nothing here.
void read_base_class(const JsonFields& fields, AdapterConfig& config) {
  const Json* mapping = fields.find("auto_mapping");
  if (!mapping || !mapping->is_object()) return;
  const auto name = mapping->find("base_model_class");
  const auto library = mapping->find("parent_library");
  if (name == mapping->end() || library == mapping->end()) return;
  if (!name->is_string() || !library->is_string()) return;
  config.base_model_class = name->get<std::string>();
  config.parent_library = library->get<std::string>();
}

Json auto_mapping(const AdapterConfig& config) {
  if (config.base_model_class.empty()) return {};
  return {{"base_model_class", config.base_model_class}, {"parent_library", config.parent_library}};
}

Json or_null(const std::string& text) {
  return text.empty() ? Json() : Json(text);
}

Json or_null(const std::vector<std::string>& names, const std::string& regex = "") {
  return names.empty() ? or_null(regex) : Json(names);
}

}  // namespace

AdapterConfig parse_adapter_config(std::string_view text, const std::string& file,
                                   std::vector<std::string>* unknown) {
  const JsonObject json = parse_json_object(text, file);
  const JsonFields fields(json, file);
  AdapterConfig config;
  config.peft_type = fields.string("peft_type");
  if (config.peft_type != "LORA" && config.peft_type != "ADALORA") {
    fields.fail("peft_type", "\"LORA\" or \"ADALORA\"", in_quotes(config.peft_type));
  }
  refuse_unsupported(fields, file);
  refuse_changed_base(fields);
  read_method(fields, config);
  config.dropout = fields.number("lora_dropout", config.dropout);
  config.fan_in_fan_out = fields.boolean("fan_in_fan_out");
  fields.strings_or_regex("target_modules", config.target_modules, config.target_modules_regex);
  fields.strings_or_regex("exclude_modules", config.exclude_modules, config.exclude_modules_regex);
  config.modules_to_save = fields.strings("modules_to_save");
  read_layers(fields, config);
  config.base_model_name_or_path = fields.string("base_model_name_or_path");
  config.revision = fields.string("revision");
  config.task_type = fields.string("task_type");
  read_base_class(fields, config);
  check_adapter_config(config, file);
  if (unknown) *unknown = unknown_in_force(fields);
  return config;
}

std::string format_adapter_config(const AdapterConfig& config, const std::string& file) {
  check_adapter_config(config, file);
  JsonMembers members = method_members(config);
  members.merge(JsonMembers{
      {"auto_mapping", auto_mapping(config)},
      {"base_model_name_or_path", or_null(config.base_model_name_or_path)},
      {"bias", "none"},
      {"exclude_modules", or_null(config.exclude_modules, config.exclude_modules_regex)},
      {"fan_in_fan_out", config.fan_in_fan_out},
      {"inference_mode", true},
      {"init_lora_weights", true},
      {"layers_pattern", or_null(config.layers_pattern)},
      {"layers_to_transform",
       config.layers_to_transform.empty() ? Json() : Json(config.layers_to_transform)},
      {"lora_dropout", config.dropout},
      {"modules_to_save", or_null(config.modules_to_save)},
      {"peft_type", config.peft_type},
      {"peft_version", peft_version},
      {"revision", or_null(config.revision)},
      {"target_modules", or_null(config.target_modules, config.target_modules_regex)},
      {"task_type", or_null(config.task_type)},
  });
  std::string text;
  try {
    text = nlohmann::ordered_json(members).dump(2) + "\n";
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
