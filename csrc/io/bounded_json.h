// JSON from untrusted files: bounded nesting and number of values, no duplicate keys.
#pragma once

#include <cstddef>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace rankwise::io {

/// The keys of an object's members that are objects, in the order of the text.
using KeyOrder = std::map<std::string, std::vector<std::string>>;

/// nlohmann::json sorts the keys.
struct JsonObject {
  nlohmann::json value;
  KeyOrder key_order;
};

/// Keys and values in one text: a value takes up to a hundred bytes of memory for one of text.
constexpr size_t max_json_values = size_t{1} << 19;

/// Parses one JSON object nested at most 32 deep, with at most max_json_values. Throws FileError
/// starting with `file` for anything else, for invalid UTF-8 and for a key given twice in one
/// object (JSON readers disagree on which one counts).
JsonObject parse_json_object(std::string_view text, const std::string& file);

/// Value and type for an error message, cut to a readable length.
std::string described(const nlohmann::json& value);

}  // namespace rankwise::io
