// Dropout on the CPU: one bit an element, drawn from Philox's numbers and applied in copies.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../dropout.h"
#include "blocks.h"

namespace rankwise {

constexpr int64_t kept_word = 64;  // elements of a word of bits

constexpr int64_t kept_words(int64_t elements) {
  return (elements + kept_word - 1) / kept_word;
}

// The seed that Dropout::draw_seed draws from PyTorch's default generator, without the dispatcher.
at::Tensor draw_seed_cpu(const Dropout& dropout);

// Which element of the whole [*, total_cols] matrix a block's (0, 0) is.
struct BlockOrigin {
  int64_t row, col, total_cols;
};

// The bits of a block: of element (i, j), bit j % 64 of [i][j / 64]; those behind a row's last
// element have any value.
using KeptBits = Rows<const uint64_t>;

// The bits of a row's elements j, j + 1, ... up to the end of j's word, from the lowest on.
[[gnu::always_inline]] inline uint64_t kept_from(const uint64_t* row, int64_t j) {
  return row[j / kept_word] >> (j % kept_word);
}

// Whether the elements of a block are kept. The threshold is that of an active dropout, 1 .. 65536.
void draw_kept(int64_t seed, uint32_t threshold, BlockOrigin origin, int64_t rows, int64_t cols,
               Rows<uint64_t> bits);

// to[i, j] = kept(i, j) ? from[i, j] : 0, converted and unscaled. For float64, float32, bfloat16,
// float16, and the last two to float32; from may be to.
template <typename From, typename To>
void copy_kept(Rows<const From> from, KeptBits kept, int64_t rows, int64_t cols, Rows<To> to);

// dst[i, j] = kept(origin + (i, j)) ? src[i, j] : 0, as draw_kept and copy_kept. Both are 2-D with
// unit column stride.
void dropout_copy(const at::Tensor& src, const at::Tensor& dst, BlockOrigin origin, int64_t seed,
                  uint32_t threshold);

}  // namespace rankwise
