// JSON from untrusted files: what is accepted, and every limit.
#include "io/bounded_json.h"

#include <gtest/gtest.h>
#include <rankwise/file_error.h>

#include "temporary_folder.h"

namespace {

using rankwise::io::FileError;
using rankwise::io::max_json_values;
using rankwise::io::parse_json_object;

std::string error_of(const std::string& text) {
  return message_of<FileError>([&] { parse_json_object(text, "F"); });
}

std::string repeated(const std::string& item, size_t times) {
  std::string text = item;
  text.reserve(times * (item.size() + 1));
  for (size_t i = 1; i < times; ++i) text += "," + item;
  return text;
}

TEST(BoundedJson, KeysOfMembersKeepTheirOrder) {
  const auto json = parse_json_object(R"({"m": {"z": 1, "a": {"y": 0}}, "l": [{"k": 2}]})", "F");
  EXPECT_EQ(json.key_order, (rankwise::io::KeyOrder{{"m", {"z", "a"}}}));
  EXPECT_EQ(json.value.at("m").at("z"), 1);
}

TEST(BoundedJson, DepthIsBounded) {
  const auto nested = [](size_t depth) {
    return "{\"a\":" + std::string(depth - 1, '[') + std::string(depth - 1, ']') + "}";
  };
  EXPECT_EQ(parse_json_object(nested(32), "F").value.size(), 1u);
  EXPECT_EQ(error_of(nested(33)), "F: must be nested at most 32 deep");
  EXPECT_EQ(error_of("{\"a\":" + std::string(1'000'000, '[')), "F: must be nested at most 32 deep");
}

TEST(BoundedJson, TheNumberOfValuesIsBounded) {
  const auto list = [](size_t count) { return "{\"a\":[" + repeated("0", count) + "]}"; };
  const size_t others = 3;  // the object, its key, the list
  EXPECT_EQ(parse_json_object(list(max_json_values - others), "F").value.at("a").size(),
            max_json_values - others);
  EXPECT_EQ(error_of(list(max_json_values - others + 1)),
            "F: must have at most 524288 keys and values");
}

// Would take minutes if ending an object cost time in proportion to its neighbours.
TEST(BoundedJson, ManyObjectsInOneList) {
  const auto json = parse_json_object("{\"a\":[" + repeated("{}", 500'000) + "]}", "F");
  EXPECT_EQ(json.value.at("a").size(), 500'000u);
}

TEST(BoundedJson, KeysMustBeDistinctInOneObject) {
  EXPECT_EQ(error_of(R"({"a": 1, "a": 1})"), "F: key \"a\" is given twice");
  EXPECT_EQ(error_of(R"({"a": [{"b": 1, "b": 2}]})"), "F: key \"b\" is given twice");
  EXPECT_EQ(parse_json_object(R"({"a": {"a": {"a": 1}}})", "F").value.size(), 1u);
}

TEST(BoundedJson, TextThatIsNotOneObject) {
  EXPECT_EQ(error_of("[]"), "F: must be a JSON object, got array []");
  EXPECT_EQ(error_of("{} {}"), "F: not valid JSON at byte 4");
  EXPECT_EQ(error_of(""), "F: not valid JSON at byte 1");
  EXPECT_EQ(error_of("{\"\xFF\": 1}"), "F: not valid JSON at byte 3");
  EXPECT_EQ(error_of(R"({"a": 1e999})"), "F: not valid JSON, a number is out of range");
}

}  // namespace
