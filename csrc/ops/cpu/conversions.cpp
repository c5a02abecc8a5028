// Conversions as loops over bits for the compiler's vectoriser, and by hand where the processor has
// an instruction.
#include "conversions.h"

#include <bit>
#include <cstring>
#include <type_traits>

#include "vector_clones.h"

#if RANKWISE_X86_DISPATCH
#include <immintrin.h>
#endif

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

// What is added to a row of sums: numbers, or those of them that are kept, or nothing.
struct RowAddend {
  const float* numbers;
  const uint64_t* kept;
};

// The same of a tile: one row for all, or rows of another tile, or nothing.
struct Addend {
  Rows<const float> numbers;
  KeptBits kept;

  RowAddend operator[](int64_t i) const {
    return {numbers.data != nullptr ? numbers[i] : nullptr,
            kept.data != nullptr ? kept[i] : nullptr};
  }
};

template <typename To>
[[gnu::always_inline]] inline void add_columns(const float* sum, const RowAddend& addend,
                                               int64_t from, int64_t cols, To* to) {
  if (addend.kept != nullptr) {
    for (int64_t j = from; j < cols; ++j)
      put(sum[j] + (kept_from(addend.kept, j) & 1 ? addend.numbers[j] : 0.0F), to + j);
  } else if (addend.numbers != nullptr) {
    for (int64_t j = from; j < cols; ++j) put(sum[j] + addend.numbers[j], to + j);
  } else {
    for (int64_t j = from; j < cols; ++j) put(sum[j], to + j);
  }
}

RANKWISE_VECTOR_CLONES
void add(Rows<const float> sums, const Addend& addend, int64_t rows, int64_t from, int64_t cols,
         Rows<float> to) {
  for (int64_t i = 0; i < rows; ++i) add_columns(sums[i], addend[i], from, cols, to[i]);
}

RANKWISE_VECTOR_CLONES
void add(Rows<const float> sums, const Addend& addend, int64_t rows, int64_t from, int64_t cols,
         Rows<uint16_t> to) {
  for (int64_t i = 0; i < rows; ++i) add_columns(sums[i], addend[i], from, cols, to[i]);
}

#if RANKWISE_X86_DISPATCH

#define RANKWISE_BFLOAT16_VECTORS RANKWISE_TARGET("avx512bf16,avx512bw,avx512dq,avx512vl")
const bool has_bfloat16_vectors =
    __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
    __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;

RANKWISE_BFLOAT16_VECTORS
inline void put(__m512 values, float* to) {
  _mm512_storeu_ps(to, values);
}

RANKWISE_BFLOAT16_VECTORS
inline void put(__m512 values, uint16_t* to) {
  constexpr int subnormal = 0x20;  // which the instruction takes for zero
  if (_mm512_fpclass_ps_mask(values, subnormal) != 0) [[unlikely]] {
    alignas(64) float numbers[16];
    _mm512_store_ps(numbers, values);
    for (int i = 0; i < 16; ++i) put(numbers[i], to + i);
    return;
  }
  const __m256bh rounded = _mm512_cvtneps_pbh(values);
  std::memcpy(to, &rounded, sizeof rounded);
}

// add_columns, sixteen at a time.
template <typename To>
RANKWISE_BFLOAT16_VECTORS inline void add_vectors(const float* sum, const RowAddend& addend,
                                                  int64_t cols, To* to) {
  if (addend.kept != nullptr) {
    for (int64_t j = 0; j < cols; j += 16) {
      const auto kept = static_cast<__mmask16>(kept_from(addend.kept, j));
      const __m512 update = _mm512_maskz_loadu_ps(kept, addend.numbers + j);
      put(_mm512_add_ps(_mm512_loadu_ps(sum + j), update), to + j);
    }
  } else if (addend.numbers != nullptr) {
    for (int64_t j = 0; j < cols; j += 16)
      put(_mm512_add_ps(_mm512_loadu_ps(sum + j), _mm512_loadu_ps(addend.numbers + j)), to + j);
  } else {
    for (int64_t j = 0; j < cols; j += 16) put(_mm512_loadu_ps(sum + j), to + j);
  }
}

// Sixteen columns at a time; returns how many are done.
template <typename To>
RANKWISE_BFLOAT16_VECTORS int64_t add_in_vectors(Rows<const float> sums, const Addend& addend,
                                                 int64_t rows, int64_t cols, Rows<To> to) {
  const int64_t done = cols / 16 * 16;
  for (int64_t i = 0; i < rows; ++i) add_vectors(sums[i], addend[i], done, to[i]);
  return done;
}

#else

constexpr bool has_bfloat16_vectors = false;
template <typename To>
int64_t add_in_vectors(Rows<const float>, const Addend&, int64_t, int64_t, Rows<To>) {
  return 0;
}

#endif

template <typename To>
void add_to(Rows<const float> sums, const Addend& addend, int64_t rows, int64_t cols, Rows<To> to) {
  using Bits = std::conditional_t<sizeof(To) == 2, uint16_t, To>;
  const Rows<Bits> bits{reinterpret_cast<Bits*>(to.data), to.stride};
  const int64_t done = has_bfloat16_vectors ? add_in_vectors(sums, addend, rows, cols, bits) : 0;
  if (done < cols) add(sums, addend, rows, done, cols, bits);
}

RANKWISE_VECTOR_CLONES
void widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = std::bit_cast<float>(uint32_t{from[i]} << 16);
}

}  // namespace

template <typename To>
void add_row(Rows<const float> sums, const float* row, int64_t rows, int64_t cols, Rows<To> to) {
  add_to(sums, {{row, /*stride=*/0}, {}}, rows, cols, to);
}
template void add_row(Rows<const float>, const float*, int64_t, int64_t, Rows<float>);
template void add_row(Rows<const float>, const float*, int64_t, int64_t, Rows<at::BFloat16>);

template <typename To>
void add_kept(Rows<const float> sums, Rows<const float> update, KeptBits kept, int64_t rows,
              int64_t cols, Rows<To> to) {
  add_to(sums, {update, kept}, rows, cols, to);
}
template void add_kept(Rows<const float>, Rows<const float>, KeptBits, int64_t, int64_t,
                       Rows<float>);
template void add_kept(Rows<const float>, Rows<const float>, KeptBits, int64_t, int64_t,
                       Rows<at::BFloat16>);

void widen_row(const at::BFloat16* from, float* to, int64_t count) {
  widen(reinterpret_cast<const uint16_t*>(from), to, count);
}

}  // namespace rankwise
