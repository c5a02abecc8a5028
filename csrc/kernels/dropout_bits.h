// Dropout decisions as bits, on the device.
#pragma once

#include "device.h"
#include "dropout_mask.h"

namespace rankwise::kernels {

// A number is kept where number << 16 is above this; of a threshold above 0.
__device__ inline uint32_t dropout_limit(uint32_t threshold) {
  return (threshold << 16) - 1;
}

// Bit i is set when number i of the block is kept.
__device__ inline uint32_t kept_in_block(const Philox& numbers, uint32_t limit) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < elements_per_block; ++i) {
    bits |= static_cast<uint32_t>(dropout_number(numbers, i) << 16 > limit) << i;
  }
  return bits;
}

}  // namespace rankwise::kernels
