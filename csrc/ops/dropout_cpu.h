// Dropout on the CPU: one bit an element, drawn from Philox's numbers and applied in copies.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace rankwise {

constexpr int64_t kept_word = 64;  // elements of a word of bits

constexpr int64_t kept_words(int64_t elements) {
  return (elements + kept_word - 1) / kept_word;
}

// Bit j % 64 of bits[j / 64]: whether element first + j of the mask is kept, for j < count (the
// bits behind them have any value). The threshold is that of an active dropout, 1 .. 65536.
void draw_kept(int64_t seed, uint32_t threshold, int64_t first, int64_t count, uint64_t* bits);

// dst[j] = bit j ? src[j] : 0, converted and unscaled. For float64, float32, bfloat16, float16, and
// the last two to float32; src may be dst.
template <typename From, typename To>
void copy_kept(const From* src, To* dst, const uint64_t* bits, int64_t count);

// Which element of the whole [*, total_cols] matrix a block's (0, 0) is.
struct BlockOrigin {
  int64_t row, col, total_cols;
};

// dst[i, j] = kept(origin + (i, j)) ? src[i, j] : 0, as copy_kept. Both are 2-D with unit column
// stride.
void dropout_copy(const at::Tensor& src, const at::Tensor& dst, BlockOrigin origin, int64_t seed,
                  uint32_t threshold);

}  // namespace rankwise
