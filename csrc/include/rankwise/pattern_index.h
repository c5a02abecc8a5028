// PatternIndex: the first of many patterns that fits a module's name. No torch here.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace rankwise {

/// Keys of rank_pattern or alpha_pattern, sorted once, so that a name is not tried with every one:
/// what a name costs grows with its length, and with the number of keys with regex syntax alone.
class PatternIndex {
 public:
  /// Throws std::invalid_argument for a key that cannot be matched (see AdapterConfig::rank_of).
  explicit PatternIndex(std::vector<std::string> keys);

  /// The place of the first key that matches the name as in PEFT's get_pattern_key, else of a key
  /// equal to it. Throws std::invalid_argument for a regular expression that would have to be
  /// matched with a name outside printable ASCII.
  std::optional<size_t> find(std::string_view name) const;

 private:
  struct Plain;
  struct Expression;
  size_t first_plain(std::string_view name) const;

  std::vector<std::string> keys_;
  std::shared_ptr<const std::vector<Plain>> plain_;  // keys without regex syntax, by their endings
  std::shared_ptr<const std::vector<Expression>> expressions_;
};

/// Whether a key has no regex syntax but '.' and escaped punctuation, so that it costs a name
/// nothing.
bool is_plain_pattern(std::string_view key);

}  // namespace rankwise
