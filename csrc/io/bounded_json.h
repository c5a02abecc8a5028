// JSON from untrusted files: bounded nesting, no duplicate keys.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace rankwise::io {

/// A JSON object, and the keys of its object members in the order of the text (nlohmann::json sorts
/// them).
struct JsonObject {
  nlohmann::json value;
  std::map<std::string, std::vector<std::string>> key_order;
};

/// Parses one JSON object nested at most 32 deep. Throws FileError starting with `file` for
/// anything else, for invalid UTF-8 and for a key given twice in one object (JSON readers disagree
/// on which one counts).
JsonObject parse_json_object(std::string_view text, const std::string& file);

/// Value and type for an error message, cut to a readable length.
std::string described(const nlohmann::json& value);

}  // namespace rankwise::io
