// Dropout of a tile's term, before the product is added to it: sums of dropped elements become
// zero.
//
//   each of four lanes     a Philox block, 8 bits      of columns 32 j + 8 lane and behind
//   two exchanges          32 bits                     of columns 32 j to 32 j + 31
//   each lane              bits 8 i + 2 lane, + 1      of its two sums in block i
#pragma once

#include "../dropout_bits.h"
#include "product_tiles.h"

namespace rankwise::kernels {

// `place`: the first of the warp's rows and of its columns.
__device__ inline void drop_sums(const ProductArguments& p, const TilePlace& place,
                                 float (&sums)[sums_each]) {
  const auto seed = static_cast<uint64_t>(*p.dropout.seed);
  const uint32_t limit = dropout_limit(p.dropout.threshold), lane = threadIdx.x % 4;
  const auto blocks = static_cast<uint64_t>(p.cols / elements_per_block);
  const uint64_t first = (place.row + threadIdx.x % 32 / 4) * blocks +
                         static_cast<uint64_t>(place.col / elements_per_block) + lane;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < tile_cols / 32; ++j) {
      const uint64_t block = first + 8 * half * blocks + 4 * j;
      uint32_t bits = kept_in_block(philox(block, seed), limit) << 8 * lane;
      bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 1);
      bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 2);
      bits >>= 2 * lane;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * j + i) + 2 * half;
        if ((bits >> 8 * i & 1) == 0) sums[at] = 0.0f;
        if ((bits >> 8 * i & 2) == 0) sums[at + 1] = 0.0f;
      }
    }
  }
}

}  // namespace rankwise::kernels
