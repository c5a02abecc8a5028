// Writes a warp's 16 rows of a tile: out = T(sums + bias), in boxes of 64 columns.
//
//   warp                                      copy engine
//   wait until at most one box is unread <--- has read the box before last: its buffer is free
//   stmatrix to the buffer, fence
//   store_box ------------------------------> reads the buffer, writes what lies in the matrix
//
// The next tile's products may begin meanwhile. Before the block ends all boxes have been read.
#pragma once

#include "multiply_operands.h"

namespace rankwise::kernels {

constexpr int column_pairs = tile_cols / 8;  // of a thread: two neighbours in every 8 columns

template <typename T>
struct Pairs;

template <>
struct Pairs<__nv_bfloat16> {
  __device__ static float2 numbers(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
  __device__ static __nv_bfloat162 rounded(float low, float high) {
    return __floats2bfloat162_rn(low, high);
  }
};

template <>
struct Pairs<__half> {
  __device__ static float2 numbers(__half2 pair) { return __half22float2(pair); }
  __device__ static __half2 rounded(float low, float high) { return __floats2half2_rn(low, high); }
};

template <typename To, typename From>
__device__ inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  return *reinterpret_cast<const To*>(&from);
}

// The thread's columns of the bias; zeros without one.
__device__ inline void load_bias(uint32_t (&bias)[column_pairs], const ProductArguments& p,
                                 int first_col) {
#pragma unroll
  for (int i = 0; i < column_pairs; ++i) {
    const int col = first_col + 8 * i + static_cast<int>(threadIdx.x % 4) * 2;
    bias[i] = 0;
    if (p.bias && col < p.cols) {
      bias[i] = __ldg(reinterpret_cast<const uint32_t*>(p.bias) + col / 2);
    }
  }
}

// Rows lane / 4 and lane / 4 + 8 of columns 16 j to 16 j + 15 of the warp's tile, as stmatrix takes
// them.
template <typename T>
__device__ inline void round_columns(uint32_t (&words)[4], const float (&sums)[sums_each],
                                     const uint32_t (&bias)[column_pairs], int j) {
  using Pair = decltype(Pairs<T>::rounded(0.0f, 0.0f));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pair = 2 * j + i / 2, at = 4 * pair + 2 * (i % 2);
    const float2 on_top = Pairs<T>::numbers(same_bits<Pair>(bias[pair]));
    words[i] = same_bits<uint32_t>(Pairs<T>::rounded(sums[at] + on_top.x, sums[at + 1] + on_top.y));
  }
}

// `place`: the first of the warp's rows and of its columns; `warp` of the multiplying ones.
template <typename T>
__device__ inline void store_result(const ProductArguments& p, const SharedTiles& shared,
                                    uint32_t warp, const TilePlace& place,
                                    const float (&sums)[sums_each],
                                    const uint32_t (&bias)[column_pairs]) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t row = lane % 16, half = lane / 16;  // of the 16 bytes that this lane names
#pragma unroll
  for (int box = 0; box < tile_cols / box_cols; ++box) {
    const uint32_t buffer = shared.result(warp, box % result_buffers);
    if (lane == 0) wait_for_stores<result_buffers - 1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < box_cols / 16; ++i) {
      uint32_t words[4];
      round_columns<T>(words, sums, bias, box * (box_cols / 16) + i);
      store_matrices(buffer + row * 128 + (((2 * i + half) ^ (row % 8)) << 4), words);
    }
    fence_shared_writes();
    __syncwarp();
    if (lane > 0) continue;
    const int col = place.col + box * box_cols;
    if (place.row < p.rows && col < p.cols) store_box(p.out, buffer, col, place.row);
    commit_stores();
  }
}

}  // namespace rankwise::kernels
