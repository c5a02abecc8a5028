// Conversions as loops over bits, for the compiler's vectoriser.
#include "conversions_cpu.h"

#include <algorithm>
#include <bit>
#include <type_traits>

#include "vector_clones.h"

namespace rankwise {
namespace {

[[gnu::always_inline]] inline void put(float value, float* to) {
  *to = value;
}

[[gnu::always_inline]] inline void put(float value, uint16_t* to) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  *to = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);  // NaN
}

template <typename To>
[[gnu::always_inline]] inline void finish(const float* sums, int64_t sums_stride,
                                          const float* update, const float* row, int64_t rows,
                                          int64_t cols, To* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, sums += sums_stride, to += stride) {
    if (update != nullptr) {
      const float* const more = update + i * cols;
      for (int64_t j = 0; j < cols; ++j) put(sums[j] + more[j], to + j);
    } else if (row != nullptr) {
      for (int64_t j = 0; j < cols; ++j) put(sums[j] + row[j], to + j);
    } else if constexpr (std::is_same_v<To, float>) {
      std::copy_n(sums, cols, to);
    } else {
      for (int64_t j = 0; j < cols; ++j) put(sums[j], to + j);
    }
  }
}

RANKWISE_VECTOR_CLONES
void finish_float(const float* sums, int64_t sums_stride, const float* update, const float* row,
                  int64_t rows, int64_t cols, float* to, int64_t stride) {
  finish(sums, sums_stride, update, row, rows, cols, to, stride);
}

RANKWISE_VECTOR_CLONES
void finish_bfloat16(const float* sums, int64_t sums_stride, const float* update, const float* row,
                     int64_t rows, int64_t cols, uint16_t* to, int64_t stride) {
  finish(sums, sums_stride, update, row, rows, cols, to, stride);
}

RANKWISE_VECTOR_CLONES
void widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = std::bit_cast<float>(uint32_t{from[i]} << 16);
}

}  // namespace

void finish_tile(const float* sums, int64_t sums_stride, const float* update, const float* row,
                 int64_t rows, int64_t cols, float* to, int64_t stride) {
  finish_float(sums, sums_stride, update, row, rows, cols, to, stride);
}

void finish_tile(const float* sums, int64_t sums_stride, const float* update, const float* row,
                 int64_t rows, int64_t cols, at::BFloat16* to, int64_t stride) {
  finish_bfloat16(sums, sums_stride, update, row, rows, cols, reinterpret_cast<uint16_t*>(to),
                  stride);
}

void widen_row(const at::BFloat16* from, float* to, int64_t count) {
  widen(reinterpret_cast<const uint16_t*>(from), to, count);
}

}  // namespace rankwise
