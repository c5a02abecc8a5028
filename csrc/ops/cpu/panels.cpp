// Packing: copies, interleaved rows, and transposition of 16 x 16 words in registers.
#include "panels.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "micro_kernel.h"
#include "vector_clones.h"

namespace rankwise {
namespace {

constexpr int64_t lanes = 16;
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));

// Exchanges lanes l + distance of the first with lanes l of the second, for l without that bit.
template <int distance, size_t... l>
[[gnu::always_inline]] inline void exchange(Words& a, Words& b, std::index_sequence<l...>) {
  const Words low = __builtin_shufflevector(a, b, ((l & distance) ? l - distance + lanes : l)...);
  b = __builtin_shufflevector(a, b, ((l & distance) ? l + lanes : l + distance)...);
  a = low;
}

template <int distance>
[[gnu::always_inline]] inline void exchange_all(Words* rows) {
  for (int64_t i = 0; i < lanes; ++i)
    if ((i & distance) == 0)
      exchange<distance>(rows[i], rows[i + distance], std::make_index_sequence<lanes>());
}

// Rows of a panel lie far apart, which the processor's own prefetching does not foresee.
[[gnu::always_inline]] inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}
constexpr int64_t rows_ahead = 16;

[[gnu::always_inline]] inline uint32_t load_word(const char* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// to[w][j] = word w of row j, for `words` words of `rows` rows that lie row_bytes apart.
RANKWISE_VECTOR_CLONES
void transpose_words(const char* from, int64_t row_bytes, int64_t rows, int64_t words, uint32_t* to,
                     int64_t stride) {
  for (int64_t j = 0; j < rows; j += lanes) {
    const char* const group = from + j * row_bytes;
    int64_t w = 0;
    if (j + lanes <= rows) {
      for (; w + lanes <= words; w += lanes) {
        Words square[lanes];
        if (w + 4 * lanes < words)
          for (int64_t i = 0; i < lanes; ++i)
            prefetch(group + i * row_bytes + 4 * (w + 4 * lanes), 64);
        for (int64_t i = 0; i < lanes; ++i)
          std::memcpy(&square[i], group + i * row_bytes + 4 * w, sizeof(Words));
        exchange_all<8>(square);
        exchange_all<4>(square);
        exchange_all<2>(square);
        exchange_all<1>(square);
        for (int64_t i = 0; i < lanes; ++i)
          std::memcpy(to + (w + i) * stride + j, &square[i], sizeof(Words));
      }
    }
    const int64_t count = std::min(lanes, rows - j);
    for (; w < words; ++w)
      for (int64_t i = 0; i < count; ++i)
        to[w * stride + j + i] = load_word(group + i * row_bytes + 4 * w);
  }
}

// to[j] = (a[j], b[j])
RANKWISE_VECTOR_CLONES
void interleave(const uint16_t* a, const uint16_t* b, int64_t count, uint32_t* to) {
  for (int64_t j = 0; j < count; ++j) to[j] = a[j] | uint32_t{b[j]} << 16;
}

}  // namespace

template <>
void pack(Elements<float> b, int64_t inner, int64_t cols, float* panel, int64_t stride) {
  if (b.down == 1) {
    transpose_words(reinterpret_cast<const char*>(b.data), 4 * b.across, cols, inner,
                    reinterpret_cast<uint32_t*>(panel), stride);
    return;
  }
  for (int64_t k = 0; k < inner; ++k) {
    if (b.across == 1) {
      if (k + rows_ahead < inner) prefetch(&b(k + rows_ahead, 0), 4 * cols);
      std::copy_n(&b(k, 0), cols, panel + k * stride);
    } else {
      for (int64_t j = 0; j < cols; ++j) panel[k * stride + j] = b(k, j);
    }
  }
}

template <>
void pack(Elements<at::BFloat16> b, int64_t inner, int64_t cols, at::BFloat16* panel,
          int64_t stride) {
  auto* const pairs = reinterpret_cast<uint32_t*>(panel);  // [inner / 2][stride]
  const auto* const bits = reinterpret_cast<const uint16_t*>(b.data);
  const int64_t even = inner / 2 * 2;
  int64_t k = 0;
  if (b.down == 1) {
    transpose_words(reinterpret_cast<const char*>(b.data), 2 * b.across, cols, even / 2, pairs,
                    stride);
    k = even;
  } else if (b.across == 1) {
    for (; k < even; k += 2) {
      if (k + rows_ahead + 1 < inner) {
        prefetch(&b(k + rows_ahead, 0), 2 * cols);
        prefetch(&b(k + rows_ahead + 1, 0), 2 * cols);
      }
      interleave(bits + k * b.down, bits + (k + 1) * b.down, cols, pairs + k / 2 * stride);
    }
  }
  for (; k < inner; k += 2) {
    for (int64_t j = 0; j < cols; ++j) {
      const uint32_t second = k + 1 < inner ? bits[(k + 1) * b.down + j * b.across] : 0;
      pairs[k / 2 * stride + j] = bits[k * b.down + j * b.across] | second << 16;
    }
  }
}

}  // namespace rankwise
