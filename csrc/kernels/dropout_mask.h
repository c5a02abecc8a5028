// Dropout decisions from Philox: element i of a tensor uses the 16-bit number i % 8 of the block
// with counter i / 8, and is dropped when that number is below the threshold.
#pragma once

#include "philox.h"

namespace rankwise::kernels {

constexpr int elements_per_block = 8;

RANKWISE_HOST_DEVICE inline uint32_t dropout_number(const Philox& block, int i) {
  return (block.word[i / 2] >> (16 * (i % 2))) & 0xFFFFu;
}

// Fills mask[0..count) with 1 (kept) or 0 (dropped); all pointers are device pointers; `seed` is
// read on the device, so nothing waits. Returns the launch's error code (cudaError_t), 0 if none.
template <typename T>
int launch_dropout_mask(const int64_t* seed, int64_t count, uint32_t threshold, T* mask,
                        void* stream);

}  // namespace rankwise::kernels
