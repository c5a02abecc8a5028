// Matching the keys of rank_pattern and alpha_pattern, exactly as PEFT's get_pattern_key and in
// bounded time.
#pragma once

#include <cstddef>
#include <optional>
#include <regex>
#include <string>
#include <string_view>

namespace rankwise::io {

/// Sum of pattern_cost over the keys of one pattern list; what a hostile file may make the matcher
/// do per module.
constexpr size_t max_pattern_cost = 4096;

/// Bytes of one regular expression; the compiler of std::regex recurses on its groups.
constexpr size_t max_pattern_length = 512;

/// A plain name's characters: bytes, or `any`, which stands for any one UTF-8 character.
using PlainName = std::u16string;
constexpr char16_t any = 0x100;

/// A key without regex syntax but '.' and escaped punctuation, as most keys are; else nothing.
std::optional<PlainName> plain_name(std::string_view key);

/// What is left of a text without its last UTF-8 character.
std::string_view without_last_character(std::string_view text);

/// 0 for a plain name, which costs nothing. Otherwise the key's length times its counted repeats, a
/// bound for the states of its automaton. Throws std::invalid_argument when the key is not a
/// regular expression, exceeds one of the two limits, or is one that Python's `re` reads
/// differently.
size_t pattern_cost(std::string_view key);

/// A key, compiled for any number of names.
class ModulePattern {
 public:
  /// Throws std::invalid_argument as pattern_cost.
  explicit ModulePattern(std::string_view key);

  /// Python: `re.match(rf"(.*\.)?({key})$", module) is not None`. Throws std::invalid_argument for
  /// a regular expression against a module name outside printable ASCII.
  bool matches(std::string_view module) const;

 private:
  std::string key_;
  std::optional<PlainName> plain_;
  std::regex regex_;  // of a key that is not plain
};

/// ModulePattern(key).matches(module).
bool pattern_matches(std::string_view key, std::string_view module);

}  // namespace rankwise::io
