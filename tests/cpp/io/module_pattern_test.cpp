// Module patterns: the answers of Python's re.match(rf"(.*\.)?({key})$", module), or a refusal.
#include "io/module_pattern.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>

#include "temporary_folder.h"

namespace {

using rankwise::io::pattern_cost;
using rankwise::io::pattern_matches;
using testing::HasSubstr;

std::string refusal(const std::string& key) {
  return message_of<std::invalid_argument>([&] { pattern_cost(key); });
}

TEST(ModulePattern, PlainNamesMatchWholeEndings) {
  EXPECT_TRUE(pattern_matches("q_proj", "q_proj"));
  EXPECT_TRUE(pattern_matches("q_proj", "layers.0.q_proj"));
  EXPECT_TRUE(pattern_matches("layers.0.q_proj", "model.layers.0.q_proj"));
  EXPECT_FALSE(pattern_matches("q_proj", "layers.0.xq_proj"));
  EXPECT_FALSE(pattern_matches("q_proj", "q_proj.lora"));
  EXPECT_FALSE(pattern_matches("layers.0.q_proj", "q_proj"));
  EXPECT_FALSE(pattern_matches("0.q_proj", "layers.10.q_proj"));
  EXPECT_EQ(pattern_cost("model.layers.0.q_proj"), 0u);
}

TEST(ModulePattern, DotIsAnyCharacterAndTheEmptyKeyMatchesATrailingDot) {
  EXPECT_TRUE(pattern_matches("layers.0", "model.layersX0"));
  EXPECT_TRUE(pattern_matches("a.b",
                              "x.a\xC3\xA9"
                              "b"));  // one character of two bytes
  EXPECT_FALSE(pattern_matches("a.b", "ab"));
  EXPECT_TRUE(pattern_matches("", ""));
  EXPECT_TRUE(pattern_matches("", "a."));
  EXPECT_FALSE(pattern_matches("", "a"));
}

TEST(ModulePattern, RegularExpressions) {
  struct Row {
    const char* key;
    const char* module;
    bool matches;
  };
  // Computed with Python 3.11.
  const Row rows[] = {
      {"^model.decoder.layers.0.k_proj", "model.decoder.layers.0.k_proj", true},
      {"^decoder.layers.0.k_proj", "model.decoder.layers.0.k_proj", false},
      {"layers\\.[0-3]\\.q_proj", "model.layers.2.q_proj", true},
      {"layers\\.[0-3]\\.q_proj", "model.layers.4.q_proj", false},
      {"layers\\.0", "model.layersX0", false},
      {"(q|v)_proj", "layers.0.v_proj", true},
      {"q|v", "layers.0.v", true},
      {".*q_proj", "layers.0.xq_proj", true},
      {"q_proj$", "layers.0.q_proj", true},
      {"layers\\.[0-9]{1,2}\\.(?:q|k)_proj", "layers.17.k_proj", true},
      {"layers\\.[0-9]{1,2}\\.(?:q|k)_proj", "layers.117.k_proj", false},
      {"layers\\.\\d+?\\.\\w+", "layers.117.k_proj", true},
      {"[^.]*_proj", "layers.0.q_proj", true},
      {"a)|(b", "ac", true},  // PEFT pastes the key: (.*\.)?(a)|(b)$
      {"a)|(b", "xb", false},
      {"\\bproj", "layers.0.proj", true},
      {"[\\w.-]+", "a-b", true},
      {"x?", "layers.", true},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(pattern_matches(row.key, row.module), row.matches) << row.key << " " << row.module;
  }
}

TEST(ModulePattern, WhatPythonReadsDifferentlyIsRefused) {
  EXPECT_EQ(refusal("(?=a)b"), "pattern \"(?=a)b\" has a group that is neither (...) nor (?:...)");
  EXPECT_THAT(refusal("(?i)a"), HasSubstr("has a group"));
  EXPECT_THAT(refusal("(?P<n>a)"), HasSubstr("has a group"));
  EXPECT_THAT(refusal("(a)\\1"), HasSubstr("has the escape \\1"));
  EXPECT_THAT(refusal("a\\Z"), HasSubstr("has the escape \\Z"));
  EXPECT_THAT(refusal("[\\b]"), HasSubstr("has the escape \\b"));
  EXPECT_THAT(refusal("a*+"), HasSubstr("has a repeated quantifier"));
  EXPECT_THAT(refusal("a**"), HasSubstr("has a repeated quantifier"));
  EXPECT_THAT(refusal("a???"), HasSubstr("has a repeated quantifier"));
  EXPECT_THAT(refusal("[[:alpha:]]"), HasSubstr("has '[' inside a set"));
  EXPECT_THAT(refusal("[]a]"), HasSubstr("has a set that begins with ']'"));
  EXPECT_THAT(refusal("[^]a]"), HasSubstr("has a set that begins with ']'"));
  EXPECT_THAT(refusal("a{,2}"), HasSubstr("has a '{' that is not"));
  EXPECT_THAT(refusal("a{x}"), HasSubstr("has a '{' that is not"));
  EXPECT_THAT(refusal("a{1;2}"), HasSubstr("has a '{' that is not"));
  EXPECT_THAT(refusal("\xC3\xA9+"), HasSubstr("must be printable ASCII"));
  EXPECT_THAT(refusal("[a"), HasSubstr("has no closing ']'"));
  EXPECT_THAT(refusal("a\\"), HasSubstr("ends with a backslash"));
  EXPECT_THAT(refusal("(a"), HasSubstr("is not a regular expression"));
  EXPECT_THAT(refusal("a{3,2}"), HasSubstr("is not a regular expression"));
  EXPECT_THAT(message_of<std::invalid_argument>([] { pattern_matches("a+", "\xC3\xA9"); }),
              HasSubstr("can only be matched with ASCII names"));
}

TEST(ModulePattern, HostileRegularExpressionsAreBounded) {
  EXPECT_THAT(refusal(std::string(513, '*')), HasSubstr("is too large"));
  EXPECT_THAT(refusal("(a{99}){99}"), HasSubstr("is too large"));
  EXPECT_THAT(refusal("a{99999999999999999999}"), HasSubstr("is too large"));
  EXPECT_EQ(pattern_cost("[a-z]{3}"), 24u);
  const std::string module = std::string(300, 'a') + "!";
  std::string nested(80, '(');
  for (int i = 0; i < 80; ++i) nested += "a*)*";
  std::string options;
  for (int i = 0; i < 100; ++i) options += "(a|a)";
  const auto start = std::chrono::steady_clock::now();
  for (const std::string& key :
       {std::string("(a+)+b"), std::string("(a|aa)*b"), nested, options + "*b"}) {
    EXPECT_FALSE(pattern_matches(key, module)) << key;
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

}  // namespace
