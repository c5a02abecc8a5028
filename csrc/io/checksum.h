// A checksum that tells changed content from what was saved: against accidents, not against
// forgery.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

namespace rankwise::io {

/// FNV-1a on 64-bit words, with a shift so that high bits count too. Every step is one to one in
/// both the word and the state: a change within one word always changes the value.
class Checksum {
 public:
  void add(uint64_t word) {
    value_ = (value_ ^ word) * 0x100000001B3;
    value_ ^= value_ >> 32;
  }

  /// As little-endian words; the last is filled up with zeros.
  void add(std::span<const std::byte> bytes) {
    static_assert(std::endian::native == std::endian::little);
    for (size_t i = 0; i < bytes.size(); i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, bytes.data() + i, bytes.size() - i < 8 ? bytes.size() - i : 8);
      add(word);
    }
  }

  /// The length too, so that texts added one after the other stay apart.
  void add(std::string_view text) {
    add(uint64_t{text.size()});
    add(std::as_bytes(std::span(text)));
  }

  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xCBF29CE484222325;
};

}  // namespace rankwise::io
