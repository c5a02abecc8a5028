// Text from a file, made fit for an error message.
#pragma once

#include <string>
#include <string_view>

namespace rankwise::io {

/// The text cut to 120 bytes, control characters shown as '?'. Valid UTF-8 stays valid.
inline std::string shortened(std::string_view text) {
  constexpr size_t limit = 120;
  size_t length = text.size();
  if (length > limit) {
    length = limit;
    while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xC0) == 0x80) --length;
  }
  std::string result;
  for (const char c : text.substr(0, length)) {
    const auto byte = static_cast<unsigned char>(c);
    result += (byte < 0x20 || byte == 0x7F) ? '?' : c;
  }
  if (length < text.size()) result += "...";
  return result;
}

inline std::string in_quotes(std::string_view text) {
  return '"' + shortened(text) + '"';
}

}  // namespace rankwise::io
