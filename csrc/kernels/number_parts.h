// A number as bfloat16 parts of eight bits each, whose sum it is: three of float32.
#pragma once

#include <cstring>

#include "device.h"

namespace rankwise::kernels {

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

// What `part`, the first part of a number, leaves of it. Infinity times zero would be NaN: where
// nothing is left, the parts that follow are too small to change a sum, and infinite of infinity.
__device__ inline float rest_of(float number, float part) {
  return number == part ? number * 0x1p-30f : number - part;
}

// parts[p]: part p of a pair, largest part first. All have the number's sign, and none is zero but
// those of zero and of numbers below 2^-66.
template <int parts_>
__device__ inline void cut(float low, float high, uint32_t (&parts)[parts_]) {
#pragma unroll
  for (int p = 0; p < parts_; ++p) {
    parts[p] = as_bits(low) >> 16 | (as_bits(high) & 0xFFFF0000u);
    low = rest_of(low, as_float(as_bits(low) & 0xFFFF0000u));
    high = rest_of(high, as_float(as_bits(high) & 0xFFFF0000u));
  }
}

}  // namespace rankwise::kernels
