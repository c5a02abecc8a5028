// The loops of the importance passes in the vectors of the machine at hand. Sums have a fixed
// order. Include it in one source file, compiled without contraction to fused multiply-adds.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "../../kernels/allocation/importance.h"
#include "vector_clones.h"

namespace rankwise {
namespace {

// The bits of a number that are all set where it is infinite or NaN.
template <class T>
constexpr auto exponent_bits = [] {
  if constexpr (sizeof(T) == 8) {
    return uint64_t{0x7FF0000000000000};
  } else {
    return uint32_t{0x7F800000};
  }
}();

struct Found {
  bool not_finite, nonzero;
};

// Integer reductions, which compilers turn into vectors.
template <class T>
[[gnu::always_inline]] inline Found inspect(const T* gradient, int64_t size) {
  using Bits = std::remove_const_t<decltype(exponent_bits<T>)>;
  Bits any = 0, not_finite = 0;
  for (int64_t i = 0; i < size; ++i) {
    const Bits bits = std::bit_cast<Bits>(gradient[i]);
    any |= bits << 1;  // without the sign
    not_finite |= (bits & exponent_bits<T>) == exponent_bits<T> ? Bits{1} : Bits{0};
  }
  return {not_finite != 0, any != 0};
}

template <class T>
[[gnu::always_inline]] inline void update(const T* parameter, const T* gradient, int64_t size,
                                          const kernels::Decay<T>& decay, T* sensitivity,
                                          T* uncertainty) {
  const kernels::Decay<T> local = decay;  // known not to overlap with what is written
  for (int64_t i = 0; i < size; ++i)
    kernels::update_importance(parameter[i], gradient[i], local, sensitivity[i], uncertainty[i]);
}

// Sum over a row of element scores, in 32 fixed lanes.
template <class T>
[[gnu::always_inline]] inline double row_score(const T* sensitivity, const T* uncertainty,
                                               int64_t size) {
  constexpr int64_t lanes = 32;
  double sum[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane)
      sum[lane] += kernels::element_score(sensitivity[i + lane], uncertainty[i + lane]);
  for (; i < size; ++i) sum[i % lanes] += kernels::element_score(sensitivity[i], uncertainty[i]);
  const auto used =
      std::bit_ceil(static_cast<uint64_t>(std::min(size, lanes)));  // E's rows have one
  for (int64_t half = static_cast<int64_t>(used) / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  return sum[0];
}

constexpr int64_t row_group = 8;  // rows whose column sums are formed side by side

// Sums over the columns of [rows, width] of element scores. `sums` has row_group * width elements,
// of which the first `width` are the result.
template <class T>
[[gnu::always_inline]] inline void column_scores(const T* sensitivity, const T* uncertainty,
                                                 int64_t rows, int64_t width, double* sums) {
  const int64_t group = row_group * width, size = rows * width;
  std::fill(sums, sums + group, 0.0);
  for (int64_t start = 0; start < size; start += group) {
    const int64_t count = std::min(group, size - start);
    for (int64_t i = 0; i < count; ++i)
      sums[i] += kernels::element_score(sensitivity[start + i], uncertainty[start + i]);
  }
  for (int64_t j = 1; j < row_group; ++j)
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[j * width + i];
}

// target_clones does not go with templates: the vector forms of the loops above for both types.
#define RANKWISE_VECTOR_LOOPS(T)                                                                 \
  RANKWISE_VECTOR_CLONES Found inspect_all(const T* g, int64_t n) {                              \
    return inspect(g, n);                                                                        \
  }                                                                                              \
  RANKWISE_VECTOR_CLONES void update_all(const T* p, const T* g, int64_t n,                      \
                                         const kernels::Decay<T>& decay, T* s, T* u) {           \
    update(p, g, n, decay, s, u);                                                                \
  }                                                                                              \
  RANKWISE_VECTOR_CLONES double score_row(const T* s, const T* u, int64_t n) {                   \
    return row_score(s, u, n);                                                                   \
  }                                                                                              \
  RANKWISE_VECTOR_CLONES void score_columns(const T* s, const T* u, int64_t rows, int64_t width, \
                                            double* sums) {                                      \
    column_scores(s, u, rows, width, sums);                                                      \
  }
RANKWISE_VECTOR_LOOPS(float)
RANKWISE_VECTOR_LOOPS(double)
#undef RANKWISE_VECTOR_LOOPS

}  // namespace
}  // namespace rankwise
