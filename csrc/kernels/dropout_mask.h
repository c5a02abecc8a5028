// Dropout decisions from Philox: element i of a tensor uses the 16-bit number i % 8 of the block
// with counter i / 8, and is dropped when that number is below the threshold.
#pragma once

#include "philox.h"

namespace rankwise::kernels {

constexpr int elements_per_block = 8;

RANKWISE_HOST_DEVICE inline uint32_t dropout_number(const Philox& block, int i) {
  return (block.word[i / 2] >> (16 * (i % 2))) & 0xFFFFu;
}

// A number is kept where number << 16 is above this; of a threshold above 0.
RANKWISE_HOST_DEVICE inline uint32_t dropout_limit(uint32_t threshold) {
  return (threshold << 16) - 1;
}

// Bit i is set when number i is kept.
RANKWISE_HOST_DEVICE inline uint32_t kept_in_block(const Philox& numbers, uint32_t limit) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < elements_per_block; ++i) {
    bits |= static_cast<uint32_t>(dropout_number(numbers, i) << 16 > limit) << i;
  }
  return bits;
}

// Fills mask[0..count) with 1 (kept) or 0 (dropped); all pointers are device pointers; `seed` is
// read on the device, so nothing waits. Returns the launch's error code (cudaError_t), 0 if none.
template <typename T>
int launch_dropout_mask(const int64_t* seed, int64_t count, uint32_t threshold, T* mask,
                        void* stream);

}  // namespace rankwise::kernels
