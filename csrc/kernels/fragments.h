// Operands of tensor-core products, from tiles in shared memory.
//
// Numbers that the tensor core does not take as they are, are cut into bfloat16 parts of eight bits
// each, whose sum is the number: three for float32, two for float16. Products of all parts with all
// parts are exact, and their sums are as good as float32's.
#pragma once

#include "device.h"

namespace rankwise::kernels {

// How many parts an operand of type T has, beside operands of type Other.
template <typename T, typename Other>
constexpr int part_count = std::is_same_v<T, Other> && sizeof(T) == 2 ? 1
                           : std::is_same_v<T, float>                 ? 3
                           : std::is_same_v<T, __half>                ? 2
                                                                      : 1;

// The type that the tensor core multiplies.
template <typename T, typename Other>
using Multiplied = std::conditional_t<std::is_same_v<T, Other> && sizeof(T) == 2, T, __nv_bfloat16>;

__device__ inline float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

__device__ inline uint32_t as_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

// fragments[p][j]: part p of the pair in place j, largest part first.
template <int parts>
__device__ inline void split(float low, float high, int j, uint32_t (&fragments)[parts][4]) {
#pragma unroll
  for (int p = 0; p < parts; ++p) {
    fragments[p][j] = as_bits(low) >> 16 | (as_bits(high) & 0xFFFF0000u);
    low -= as_float(as_bits(low) & 0xFFFF0000u);
    high -= as_float(as_bits(high) & 0xFFFF0000u);
  }
}

// 16 x 16 elements (i, k) of an operand, i counting the product's rows or columns and k what is
// summed; they lie at tile[i * pitch + k] or, with `transposed`, at tile[k * pitch + i].
// Place j of a fragment has i below 8 for j = 0, 2 and k below 8 for j = 0, 1: the order of mma's
// first operand. Its second operand's two columns of 8 are places {0, 2} and {1, 3}.
template <bool transposed, int pitch, typename T, int parts>
__device__ inline void load_fragment(const T* tile, uint32_t (&fragments)[parts][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (parts == 1) {
    static_assert(sizeof(T) == 2, "a number of one part has 16 bits");
    const int row = transposed ? lane % 8 + lane / 16 * 8 : lane % 16;
    const int col = transposed ? lane / 8 % 2 * 8 : lane / 16 * 8;
    load_matrices<transposed>(fragments[0], tile + row * pitch + col);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = lane / 4 + j % 2 * 8, k = lane % 4 * 2 + j / 2 * 8;
      const T* pair = transposed ? tile + k * pitch + i : tile + i * pitch + k;
      split(static_cast<float>(pair[0]), static_cast<float>(pair[transposed ? pitch : 1]), j,
            fragments);
    }
  }
}

// sums[n] += a b for the columns n of 8 of b, smallest products first.
template <typename Mma, int parts_a, int parts_b>
__device__ inline void multiply_add_parts(float (&sums)[2][4], const uint32_t (&a)[parts_a][4],
                                          const uint32_t (&b)[parts_b][4], bool second) {
#pragma unroll
  for (int order = parts_a + parts_b - 2; order >= 0; --order) {
#pragma unroll
    for (int p = 0; p < parts_a; ++p) {
      if (order - p < 0 || order - p >= parts_b) continue;
      const uint32_t(&from)[4] = b[order - p];
      const uint32_t first_column[2] = {from[0], from[2]}, second_column[2] = {from[1], from[3]};
      multiply_add<Mma>(sums[0], a[p], first_column);
      if (second) multiply_add<Mma>(sums[1], a[p], second_column);
    }
  }
}

}  // namespace rankwise::kernels
