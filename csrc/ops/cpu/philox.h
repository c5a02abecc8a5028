// Philox4x32-7 (kernels/philox.h) for many counters at once.
#pragma once

#include <cstdint>

namespace rankwise {

constexpr int64_t philox_lanes = 16;  // blocks made together

// Writes the 4 words of each of `blocks` (rounded up to philox_lanes) blocks from `first` on.
void philox_numbers(uint64_t seed, uint64_t first, int64_t blocks, uint32_t* words);

}  // namespace rankwise
