// Matching the keys of rank_pattern and alpha_pattern, exactly as PEFT's get_pattern_key and in
// bounded time.
#pragma once

#include <cstddef>
#include <string_view>

namespace rankwise::io {

/// Sum of pattern_cost over the keys of one pattern list; what a hostile file may make the matcher
/// do per module.
constexpr size_t max_pattern_cost = 4096;

/// Bytes of one regular expression; the compiler of std::regex recurses on its groups.
constexpr size_t max_pattern_length = 512;

/// 0 for a plain name (characters without meaning in a regex, or '.'), which costs nothing.
/// Otherwise the key's length times its counted repeats, a bound for the states of its automaton.
/// Throws std::invalid_argument when the key is not a regular expression, exceeds one of the two
/// limits, or is one that Python's `re` reads differently.
size_t pattern_cost(std::string_view key);

/// Python: `re.match(rf"(.*\.)?({key})$", module) is not None`. Throws std::invalid_argument as
/// pattern_cost, and for a regular expression against a module name outside printable ASCII.
bool pattern_matches(std::string_view key, std::string_view module);

}  // namespace rankwise::io
