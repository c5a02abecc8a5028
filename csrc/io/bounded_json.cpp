// JSON from untrusted files: depth and duplicate keys are checked by a callback while the text is
// parsed.
#include "bounded_json.h"

#include <rankwise/file_error.h>

#include <set>

#include "message_text.h"

namespace rankwise::io {
namespace {

class ParseCheck {
 public:
  ParseCheck(const std::string& file, JsonObject& result) : file_(file), result_(result) {}

  void operator()(int depth, nlohmann::json::parse_event_t event, const nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    constexpr int max_depth = 32;
    if ((event == Event::object_start || event == Event::array_start) && depth >= max_depth) {
      throw FileError(file_ + ": must be nested at most " + std::to_string(max_depth) + " deep");
    }
    if (event == Event::object_start) keys_.emplace_back();
    if (event == Event::object_end) keys_.pop_back();
    if (event == Event::key) add_key(depth, value.get_ref<const std::string&>());
  }

 private:
  void add_key(int depth, const std::string& key) {
    if (!keys_.back().insert(key).second) {
      throw FileError(file_ + ": key " + in_quotes(key) + " is given twice");
    }
    if (depth == 1) member_ = key;
    if (depth == 2) result_.key_order[member_].push_back(key);
  }

  const std::string& file_;
  JsonObject& result_;
  std::vector<std::set<std::string>> keys_;  // of every open object
  std::string member_;                       // the current key of the outermost object
};

}  // namespace

JsonObject parse_json_object(std::string_view text, const std::string& file) {
  JsonObject result;
  ParseCheck check(file, result);
  const auto callback = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    check(depth, event, value);
    return true;
  };
  try {
    result.value = nlohmann::json::parse(text.begin(), text.end(), callback);
  } catch (const nlohmann::json::parse_error& error) {
    throw FileError(file + ": not valid JSON at byte " + std::to_string(error.byte));
  } catch (const nlohmann::json::out_of_range&) {
    throw FileError(file + ": not valid JSON, a number is out of range");
  }
  if (!result.value.is_object()) {
    throw FileError(file + ": must be a JSON object, got " + described(result.value));
  }
  return result;
}

std::string described(const nlohmann::json& value) {
  if (value.is_null()) return "null";
  if (value.is_string()) return in_quotes(value.get_ref<const std::string&>());
  return std::string(value.type_name()) + " " + shortened(value.dump());
}

}  // namespace rankwise::io
