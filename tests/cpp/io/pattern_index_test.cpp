// PatternIndex: the same first match as trying every pattern in its order.
#include <gtest/gtest.h>
#include <rankwise/adapter_config.h>
#include <rankwise/pattern_index.h>

#include <random>
#include <stdexcept>

#include "io/module_pattern.h"

namespace {

using rankwise::AdapterConfig;
using rankwise::ModuleSettings;
using rankwise::PatternIndex;
using rankwise::io::pattern_matches;
using Keys = std::vector<std::string>;

std::optional<size_t> first_tried(const Keys& keys, const std::string& name) {
  for (size_t place = 0; place < keys.size(); ++place)
    if (pattern_matches(keys[place], name)) return place;
  return std::nullopt;
}

/// Words of few letters, so that random keys fit random names by chance; é has two bytes.
std::string random_word(std::mt19937& random, size_t most) {
  const std::string letters[] = {"a", "b", ".", ".", "\xC3\xA9", "\\."};
  std::string word;
  for (size_t count = random() % (most + 1); count > 0; --count) word += letters[random() % 6];
  return word;
}

TEST(PatternIndex, TheFirstMatchIsThatOfTryingAll) {
  std::mt19937 random(1);
  size_t found = 0;
  for (int round = 0; round < 2000; ++round) {
    Keys keys(random() % 12);
    for (std::string& key : keys) key = random_word(random, 5);
    const PatternIndex index(keys);
    for (int i = 0; i < 10; ++i) {
      const std::string name = random_word(random, 8);
      EXPECT_EQ(index.find(name), first_tried(keys, name)) << name;
      found += index.find(name).has_value();
    }
  }
  EXPECT_GT(found, 2000u);
}

TEST(PatternIndex, AnEscapedDotIsADot) {
  const PatternIndex index({"h\\.1", "h.1"});
  EXPECT_EQ(index.find("x.h.1"), 0u);
  EXPECT_EQ(index.find("x.h_1"), 1u);
  EXPECT_TRUE(rankwise::is_plain_pattern("h\\.1"));
  EXPECT_FALSE(rankwise::is_plain_pattern("h\\d"));
}

TEST(PatternIndex, ExpressionsAndNamesKeepTheirOrder) {
  const PatternIndex index({"h.1.q", "h\\.[01]\\..", "q", "h.0.v", ".*"});
  EXPECT_EQ(index.find("x.h.1.q"), 0u);
  EXPECT_EQ(index.find("h.1.v"), 1u);
  EXPECT_EQ(index.find("h.0.v"), 1u);
  EXPECT_EQ(index.find("h.2.q"), 2u);
  EXPECT_EQ(index.find("x"), 4u);
}

TEST(PatternIndex, AKeyThatDoesNotMatchItselfStillNamesItself) {
  const PatternIndex index({"a+b", "c"});
  EXPECT_EQ(index.find("a+b"), 0u);
  EXPECT_EQ(index.find("aab"), 0u);
  EXPECT_EQ(index.find("x.a+b"), std::nullopt);
}

TEST(PatternIndex, WithoutKeysNothingIsFound) {
  EXPECT_EQ(PatternIndex({}).find("a"), std::nullopt);
  EXPECT_EQ(PatternIndex({""}).find(""), 0u);
}

TEST(PatternIndex, RefusesWhatCannotBeMatched) {
  EXPECT_THROW(PatternIndex({"a", "(?=b)"}), std::invalid_argument);
  EXPECT_THROW(PatternIndex({"[a]"}).find("\xC3\xA9"), std::invalid_argument);
}

TEST(PatternIndex, LongNamesTakeNoStack) {
  const std::string name(size_t{1} << 22, 'a');
  EXPECT_EQ(PatternIndex({name}).find(name), 0u);
}

TEST(ModuleSettings, AreThoseOfTheConfiguration) {
  AdapterConfig config;
  config.rank_pattern = {{"h.0.q", 3}, {"q", 0}, {"h\\.1\\..*", 5}};
  config.alpha_pattern = {{"v", 2.5}};
  config.rslora = true;
  const ModuleSettings settings(config);
  for (const char* module : {"h.0.q", "h.2.q", "h.1.v", "h.1.k", "x"}) {
    EXPECT_EQ(settings.rank_of(module), config.rank_of(module));
    EXPECT_EQ(settings.alpha_of(module), config.alpha_of(module));
    EXPECT_EQ(settings.scaling(module), config.scaling(module));
  }
  EXPECT_EQ(settings.rank_of("h.1.v"), 5);
  EXPECT_EQ(settings.alpha_of("h.1.v"), 2.5);
}

}  // namespace
