// JSON from untrusted files: the text is checked token by token before anything is built of it.
#include "bounded_json.h"

#include <rankwise/file_error.h>

#include <set>
#include <utility>

#include "message_text.h"

namespace rankwise::io {
namespace {

using Json = nlohmann::json;

/// Walks over the text and builds nothing but the keys. Not nlohmann's parser callback: there each
/// object or array that ends costs time in proportion to the values beside it.
class ParseCheck final : public nlohmann::json_sax<Json> {
 public:
  explicit ParseCheck(const std::string& file) : file_(file) {}

  bool null() override { return count(); }
  bool boolean(bool) override { return count(); }
  bool number_integer(Json::number_integer_t) override { return count(); }
  bool number_unsigned(Json::number_unsigned_t) override { return count(); }
  bool number_float(Json::number_float_t, const std::string&) override { return count(); }
  bool string(std::string&) override { return count(); }
  bool binary(Json::binary_t&) override { return count(); }

  bool start_object(size_t) override { return open(); }
  bool start_array(size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(std::string& key) override {
    count();
    if (!keys_.back().insert(key).second) fail("key " + in_quotes(key) + " is given twice");
    if (keys_.size() == 1) member_ = key;
    if (keys_.size() == 2) key_order_[member_].push_back(key);
    return true;
  }

  bool parse_error(size_t position, const std::string&, const Json::exception& error) override {
    constexpr int number_overflow = 406;
    if (error.id == number_overflow) fail("not valid JSON, a number is out of range");
    fail("not valid JSON at byte " + std::to_string(position));
  }

  KeyOrder take_key_order() { return std::move(key_order_); }

 private:
  [[noreturn]] void fail(const std::string& reason) { throw FileError(file_ + ": " + reason); }

  bool count() {
    if (++values_ > max_json_values)
      fail("must have at most " + std::to_string(max_json_values) + " keys and values");
    return true;
  }

  bool open() {
    constexpr size_t max_depth = 32;
    if (keys_.size() == max_depth) {
      fail("must be nested at most " + std::to_string(max_depth) + " deep");
    }
    keys_.emplace_back();
    return count();
  }

  bool close() {
    keys_.pop_back();
    return true;
  }

  const std::string& file_;
  KeyOrder key_order_;
  std::vector<std::set<std::string>> keys_;  // of every open object; of an array none
  std::string member_;                       // the current key of the outermost object
  size_t values_ = 0;
};

}  // namespace

JsonObject parse_json_object(std::string_view text, const std::string& file) {
  ParseCheck check(file);
  Json::sax_parse(text.begin(), text.end(), &check);
  JsonObject result{Json::parse(text.begin(), text.end()), check.take_key_order()};
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
