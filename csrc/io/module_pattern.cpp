// Patterns over module names: plain names directly, the part of Python's regex syntax that
// std::regex shares through std::regex. The rest (look-around, back-references, flags, possessive
// quantifiers, ...) is refused, not guessed.
#include "module_pattern.h"

#include <algorithm>
#include <cctype>
#include <stdexcept>

#include "message_text.h"

namespace rankwise::io {
namespace {

constexpr std::string_view special = "\\^$|()[]{}*+?";

bool is_punctuation(char c) {
  return c > 0x20 && c < 0x7F && !std::isalnum(static_cast<unsigned char>(c));
}

bool is_printable_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7F; });
}

/// Walks a regular expression, refuses what Python and ECMAScript read differently, and multiplies
/// its repeat counts.
class RegexScreen {
 public:
  explicit RegexScreen(std::string_view key) : key_(key) {}

  size_t cost() {
    if (!is_printable_ascii(key_)) refuse("must be printable ASCII");
    if (key_.size() > max_pattern_length) refuse("is too large");
    while (at_ < key_.size()) step();
    if (in_class_) refuse("has no closing ']'");
    if (key_.size() * repeats_ > max_pattern_cost) refuse("is too large");
    return key_.size() * repeats_;
  }

  [[noreturn]] void refuse(const std::string& reason) const {
    throw std::invalid_argument("pattern " + in_quotes(key_) + " " + reason);
  }

 private:
  char peek(size_t ahead) const { return at_ + ahead < key_.size() ? key_[at_ + ahead] : '\0'; }

  void step() {
    const char c = key_[at_];
    if (c == '\\') {
      escape();
    } else if (in_class_) {
      if (c == '[') refuse("has '[' inside a set");
      in_class_ = c != ']';
      ++at_;
    } else if (c == '*' || c == '+' || c == '?' || c == '{') {
      quantifier(c);
      return;
    } else if (c == '[') {
      at_ += peek(1) == '^' ? 2 : 1;
      if (peek(0) == ']') refuse("has a set that begins with ']'");
      in_class_ = true;
    } else if (c == '(' && peek(1) == '?') {
      if (peek(2) != ':') refuse("has a group that is neither (...) nor (?:...)");
      at_ += 3;
    } else {
      ++at_;
    }
    quantifiers_ = 0;
  }

  void escape() {
    const char c = peek(1);
    const std::string_view shared = in_class_ ? "dDwWsS" : "dDwWsSbB";
    if (c == '\0') refuse("ends with a backslash");
    if (std::isalnum(static_cast<unsigned char>(c)) && shared.find(c) == std::string_view::npos) {
      refuse(std::string("has the escape \\") + c);
    }
    at_ += 2;
  }

  /// At most one quantifier with one lazy mark: Python reads a second one as possessive or as an
  /// error.
  void quantifier(char c) {
    ++quantifiers_;
    if (quantifiers_ > 2 || (quantifiers_ == 2 && c != '?')) refuse("has a repeated quantifier");
    ++at_;
    if (c != '{') return;
    size_t count = number();
    if (peek(0) == ',') {
      ++at_;
      if (peek(0) != '}') count = std::max(count, number());
    }
    if (peek(0) != '}') refuse("has a '{' that is not {n}, {n,} or {n,m}");
    ++at_;
    repeats_ *= std::max<size_t>(count, 1);
    if (repeats_ > max_pattern_cost) refuse("is too large");
  }

  size_t number() {
    size_t value = 0;
    const size_t start = at_;
    for (; peek(0) >= '0' && peek(0) <= '9'; ++at_) {
      value = std::min(value * 10 + static_cast<size_t>(peek(0) - '0'), max_pattern_cost + 1);
    }
    if (at_ == start) refuse("has a '{' that is not {n}, {n,} or {n,m}");
    return value;
  }

  std::string_view key_;
  size_t at_ = 0;
  bool in_class_ = false;
  int quantifiers_ = 0;  // in a row, up to here
  size_t repeats_ = 1;
};

std::regex compiled(std::string_view key) {
  RegexScreen screen(key);
  screen.cost();
  // PEFT pastes the key between these, so that "a)|(b" is two alternatives; so do we.
  const std::string pattern = "(.*\\.)?(" + std::string(key) + ")$";
  auto flags = std::regex::ECMAScript | std::regex::nosubs;
#ifdef __GLIBCXX__
  flags |= std::regex_constants::__polynomial;  // breadth-first: no exponential backtracking
#endif
  try {
    std::regex regex;
    regex.imbue(std::locale::classic());
    regex.assign(pattern, flags);
    return regex;
  } catch (const std::regex_error&) {
    screen.refuse("is not a regular expression");
  }
}

/// Whether the name ends in the key, at the start of one of its parts.
bool plain_match(const PlainName& key, std::string_view module) {
  for (auto symbol = key.rbegin(); symbol != key.rend(); ++symbol) {
    if (module.empty()) return false;
    if (*symbol == any) {
      module = without_last_character(module);
    } else if (*symbol == static_cast<unsigned char>(module.back())) {
      module.remove_suffix(1);
    } else {
      return false;
    }
  }
  return module.empty() || module.back() == '.';
}

}  // namespace

std::optional<PlainName> plain_name(std::string_view key) {
  PlainName name;
  for (size_t i = 0; i < key.size(); ++i) {
    const bool escape = key[i] == '\\';
    if (escape && (++i == key.size() || !is_punctuation(key[i]))) return std::nullopt;
    if (!escape && special.find(key[i]) != std::string_view::npos) return std::nullopt;
    name += !escape && key[i] == '.' ? any : static_cast<unsigned char>(key[i]);
  }
  return name;
}

std::string_view without_last_character(std::string_view text) {
  const auto continues = [](char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; };
  while (text.size() > 1 && continues(text.back())) text.remove_suffix(1);
  text.remove_suffix(1);
  return text;
}

size_t pattern_cost(std::string_view key) {
  if (plain_name(key)) return 0;
  compiled(key);
  return RegexScreen(key).cost();
}

ModulePattern::ModulePattern(std::string_view key) : key_(key), plain_(plain_name(key)) {
  if (!plain_) regex_ = compiled(key);
}

bool ModulePattern::matches(std::string_view module) const {
  if (plain_) return plain_match(*plain_, module);
  if (!is_printable_ascii(module)) {
    throw std::invalid_argument("pattern " + in_quotes(key_) +
                                " can only be matched with ASCII names, got " + in_quotes(module));
  }
  return std::regex_search(module.begin(), module.end(), regex_,
                           std::regex_constants::match_continuous);
}

bool pattern_matches(std::string_view key, std::string_view module) {
  return ModulePattern(key).matches(module);
}

}  // namespace rankwise::io
