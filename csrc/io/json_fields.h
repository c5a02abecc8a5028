// Typed access to the members of one JSON object from an untrusted file. Torch-free.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "bounded_json.h"

namespace rankwise::io {

/// Every function throws FileError beginning with `file` when a member has another type: field,
/// wanted, got. The object must outlive it.
class JsonFields {
 public:
  JsonFields(const JsonObject& object, const std::string& file)
      : object_(object.value), key_order_(object.key_order), file_(file) {}

  [[noreturn]] void fail(const std::string& field, const std::string& wanted,
                         const std::string& got) const;

  /// The member, or nullptr when it is missing or null.
  const nlohmann::json* find(const char* field) const;

  /// Calls `visit(key, member)` for the members that no function here was asked for.
  void not_asked_for(
      const std::function<void(const std::string& key, const nlohmann::json& value)>& visit) const;

  /// false when the member is missing or null; the lists and strings below are then empty.
  bool boolean(const char* field) const;
  std::string string(const char* field) const;
  std::vector<std::string> strings(const char* field) const;
  /// A list of names, or one string, a regex, kept apart.
  void strings_or_regex(const char* field, std::vector<std::string>& names,
                        std::string& regex) const;

  /// `otherwise` when the member is missing; null is an error.
  int64_t integer(const char* field, int64_t otherwise) const;
  double number(const char* field, double otherwise) const;

  /// `value` as an item named `field` in errors.
  int64_t to_integer(const std::string& field, const nlohmann::json& value) const;
  double to_number(const std::string& field, const nlohmann::json& value) const;
  std::vector<bool> to_booleans(const std::string& field, const nlohmann::json& value) const;

  /// Calls `visit(key, name of the item, item)` for the members of an object, in the order of the
  /// file; not at all when it is missing or null.
  void members(const char* field,
               const std::function<void(const std::string& key, const std::string& name,
                                        const nlohmann::json& value)>& visit) const;

 private:
  std::string to_string(const std::string& field, const nlohmann::json& value) const;
  const nlohmann::json* member(const char* field) const;

  mutable std::set<std::string, std::less<>> asked_for_;
  const nlohmann::json& object_;
  const std::map<std::string, std::vector<std::string>>& key_order_;
  const std::string& file_;
};

}  // namespace rankwise::io
