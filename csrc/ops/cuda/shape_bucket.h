// Sizes that share what was chosen for one of them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace rankwise {

// The largest size of the bucket that `size` >= 0 belongs to: sizes up to 16 alone, larger ones
// rounded up to four binary digits, so at most an eighth more.
inline int64_t largest_of_bucket(int64_t size) {
  const auto first_digit =
      static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(size, 1))));
  const int64_t step = std::max<int64_t>(first_digit / 8, 1);
  return (size + step - 1) / step * step;
}

}  // namespace rankwise
