// Patterns over module names: plain names directly, the part of Python's regex syntax that
// std::regex shares through std::regex. The rest (look-around, back-references, flags, possessive
// quantifiers, ...) is refused, not guessed.
#include "module_pattern.h"

#include <algorithm>
#include <cctype>
#include <regex>
#include <stdexcept>
#include <string>

#include "message_text.h"

namespace rankwise::io {
namespace {

bool is_plain(std::string_view key) {
  return key.find_first_of("\\^$|()[]{}*+?") == std::string_view::npos;
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

/// A key of ordinary characters and '.', which stands for any one UTF-8 character, against the end
/// of the name.
bool plain_match(std::string_view key, std::string_view module) {
  size_t end = module.size();
  for (size_t i = key.size(); i-- > 0;) {
    if (end == 0) return false;
    --end;
    if (key[i] == '.') {
      while (end > 0 && (static_cast<unsigned char>(module[end]) & 0xC0) == 0x80) --end;
    } else if (key[i] != module[end]) {
      return false;
    }
  }
  return end == 0 || module[end - 1] == '.';
}

}  // namespace

size_t pattern_cost(std::string_view key) {
  if (is_plain(key)) return 0;
  compiled(key);
  return RegexScreen(key).cost();
}

bool pattern_matches(std::string_view key, std::string_view module) {
  if (is_plain(key)) return plain_match(key, module);
  const std::regex regex = compiled(key);
  if (!is_printable_ascii(module)) {
    throw std::invalid_argument("pattern " + in_quotes(key) +
                                " can only be matched with ASCII names, got " + in_quotes(module));
  }
  return std::regex_search(module.begin(), module.end(), regex,
                           std::regex_constants::match_continuous);
}

}  // namespace rankwise::io
