// Plain keys sorted from their last letters to the first: names are matched with them by their
// endings, so that each letter of a name narrows the range of keys that are left.
#include <rankwise/pattern_index.h>

#include <algorithm>
#include <utility>

#include "module_pattern.h"

namespace rankwise {

struct PatternIndex::Plain {
  size_t place;
  io::PlainName reversed;
};

struct PatternIndex::Expression {
  size_t place;
  io::ModulePattern pattern;
};

PatternIndex::PatternIndex(std::vector<std::string> keys) : keys_(std::move(keys)) {
  std::vector<Plain> plain;
  std::vector<Expression> expressions;
  for (size_t place = 0; place < keys_.size(); ++place) {
    if (auto name = io::plain_name(keys_[place])) {
      std::reverse(name->begin(), name->end());
      plain.push_back({place, std::move(*name)});
    } else {
      expressions.push_back({place, io::ModulePattern(keys_[place])});
    }
  }
  std::sort(plain.begin(), plain.end(),
            [](const Plain& a, const Plain& b) { return a.reversed < b.reversed; });
  plain_ = std::make_shared<const std::vector<Plain>>(std::move(plain));
  expressions_ = std::make_shared<const std::vector<Expression>>(std::move(expressions));
}

std::optional<size_t> PatternIndex::find(std::string_view name) const {
  const size_t plain = first_plain(name);
  for (const Expression& expression : *expressions_) {
    if (expression.place > plain) break;
    if (expression.pattern.matches(name)) return expression.place;
  }
  if (plain < keys_.size()) return plain;
  for (const Expression& expression : *expressions_)
    if (keys_[expression.place] == name) return expression.place;
  return std::nullopt;
}

// The place of the first plain key that matches, or the number of keys.
size_t PatternIndex::first_plain(std::string_view name) const {
  using Key = std::vector<Plain>::const_iterator;
  struct Candidates {  // keys whose last `depth` letters fit what follows `rest` in the name
    Key begin, end;
    size_t depth;
    std::string_view rest;
  };
  size_t first = keys_.size();
  std::vector<Candidates> pending = {{plain_->begin(), plain_->end(), 0, name}};
  while (!pending.empty()) {
    const auto [begin, end, depth, rest] = pending.back();
    pending.pop_back();
    const auto below = [&, begin = begin, end = end, depth = depth](int letter) {
      return std::partition_point(begin, end, [&](const Plain& key) {
        return key.reversed.size() == depth || key.reversed[depth] < letter;
      });
    };
    const auto narrow = [&, depth = depth](int letter, std::string_view further) {
      const Candidates next{below(letter), below(letter + 1), depth + 1, further};
      if (next.begin != next.end) pending.push_back(next);
    };
    if (rest.empty() || rest.back() == '.') {
      const Key used_up = below(0);
      for (Key key = begin; key != used_up; ++key) first = std::min(first, key->place);
    }
    if (rest.empty()) continue;
    narrow(io::any, io::without_last_character(rest));
    narrow(static_cast<unsigned char>(rest.back()), rest.substr(0, rest.size() - 1));
  }
  return first;
}

bool is_plain_pattern(std::string_view key) {
  return io::plain_name(key).has_value();
}

}  // namespace rankwise
