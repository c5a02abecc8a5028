// Typed access to the members of one JSON object from an untrusted file.
#include "json_fields.h"

#include <rankwise/file_error.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "message_text.h"

namespace rankwise::io {

using Json = nlohmann::json;

void JsonFields::fail(const std::string& field, const std::string& wanted,
                      const std::string& got) const {
  throw FileError(file_ + ": " + field + " must be " + wanted + ", got " + got);
}

const Json* JsonFields::member(const char* field) const {
  asked_for_.insert(field);
  const auto it = object_.find(field);
  return it == object_.end() ? nullptr : &*it;
}

const Json* JsonFields::find(const char* field) const {
  const Json* value = member(field);
  return value && !value->is_null() ? value : nullptr;
}

void JsonFields::not_asked_for(
    const std::function<void(const std::string&, const Json&)>& visit) const {
  for (const auto& [key, value] : object_.items()) {
    if (!asked_for_.contains(key)) visit(key, value);
  }
}

bool JsonFields::boolean(const char* field) const {
  const Json* value = find(field);
  if (value && !value->is_boolean()) fail(field, "a boolean", described(*value));
  return value && value->get<bool>();
}

std::string JsonFields::string(const char* field) const {
  const Json* value = find(field);
  return value ? to_string(field, *value) : std::string();
}

std::string JsonFields::to_string(const std::string& field, const Json& value) const {
  if (!value.is_string()) fail(field, "a string", described(value));
  return value.get<std::string>();
}

std::vector<std::string> JsonFields::strings(const char* field) const {
  std::vector<std::string> result;
  const Json* value = find(field);
  if (value && !value->is_array()) fail(field, "a list of strings", described(*value));
  for (const Json& item : value ? *value : Json::array()) {
    result.push_back(to_string(std::string("every item of ") + field, item));
  }
  return result;
}

void JsonFields::strings_or_regex(const char* field, std::vector<std::string>& names,
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

int64_t JsonFields::integer(const char* field, int64_t otherwise) const {
  const Json* value = member(field);
  return value ? to_integer(field, *value) : otherwise;
}

double JsonFields::number(const char* field, double otherwise) const {
  const Json* value = member(field);
  return value ? to_number(field, *value) : otherwise;
}

int64_t JsonFields::to_integer(const std::string& field, const Json& value) const {
  const bool too_large = value.is_number_unsigned() &&
                         value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()};
  if (!value.is_number_integer() || too_large) fail(field, "an integer", described(value));
  return value.get<int64_t>();
}

double JsonFields::to_number(const std::string& field, const Json& value) const {
  if (!value.is_number()) fail(field, "a number", described(value));
  return value.get<double>();
}

std::vector<bool> JsonFields::to_booleans(const std::string& field, const Json& value) const {
  if (!value.is_array()) fail(field, "a list of booleans", described(value));
  std::vector<bool> result;
  for (const Json& item : value) {
    if (!item.is_boolean()) fail("every item of " + field, "a boolean", described(item));
    result.push_back(item.get<bool>());
  }
  return result;
}

void JsonFields::members(
    const char* field,
    const std::function<void(const std::string&, const std::string&, const Json&)>& visit) const {
  const Json* value = find(field);
  if (!value) return;
  if (!value->is_object()) fail(field, "an object", described(*value));
  const auto order = key_order_.find(field);
  if (order == key_order_.end()) return;
  for (const std::string& key : order->second) {
    visit(key, std::string(field) + " " + in_quotes(key), value->at(key));
  }
}

}  // namespace rankwise::io
