// What a block of the product knows: its arguments, its tiles and where things lie in its shared
// memory.
#pragma once

#include "../lora_linear.h"
#include "instructions.h"
#include "tile.h"

namespace rankwise::kernels {

// What blocks beside the product work on (beside_product.h).
struct BesideArguments {
  TensorMap x;       // of a gradient, in boxes of a tile's rows
  TensorMap skinny;  // A, all its directions to a box; or dh, as x
  int blocks;
  int chunk;  // of dA: row tiles of a sum
  int rank;
  void *hidden, *term;  // [rows, rank]
  int64_t term_stride;
  float scale;
  const void* E;    // [rank], or null
  uint32_t* flags;  // a counter of blocks, and one of warps for each row tile
  float* partial;   // [chunks, cols, rank rounded up to a multiple of 8]
};

struct ProductArguments {
  TensorMap left, right, tail_left, tail_right, out;
  const void* bias;     // or null
  DropoutMask dropout;  // of the term
  int rows, cols;
  int depth_blocks;  // of 64
  int tail_steps;    // of 16: ceil(rank / 16)
  int tiles_down, tiles_across;
  BesideArguments beside;

  __device__ int tail_blocks() const {
    constexpr int steps = tile_depth / step_depth;
    return (tail_steps + steps - 1) / steps;
  }
};

struct TilePlace {
  int row, col;
};

// Tile number i of the output, counted through bands of 16 tiles down: the blocks that work at the
// same time share rows of `left` and of `right` in the L2 cache.
__device__ inline TilePlace place_of(const ProductArguments& p, int i) {
  constexpr int band = 16;
  const int in_band = band * p.tiles_across, first = i / in_band * band;
  const int down = p.tiles_down - first < band ? p.tiles_down - first : band;
  const int across = i % in_band / down;
  return {(first + i % in_band % down) * tile_rows, across * tile_cols};
}

// A block's part of work that is dealt out: numbers first, first + step...
struct Share {
  int first, step;
};

constexpr int sums_each = group_rows * tile_cols / warpgroup;  // of a thread

// Addresses of a block's shared memory (tile.h).
struct SharedTiles {
  uint32_t start;

  __device__ static SharedTiles of_block() {
    const uint32_t first = shared_address(dynamic_shared<unsigned char>());
    return {(first + box_alignment - 1) / box_alignment * box_alignment};
  }
  __device__ uint32_t left(uint32_t stage) const { return start + stage * left_bytes; }
  __device__ uint32_t right(uint32_t stage) const {
    return start + right_start + stage * right_bytes;
  }
  __device__ uint32_t result(uint32_t warp, uint32_t buffer) const {
    return start + result_start + (warp * result_buffers + buffer) * result_bytes;
  }
  // Operands are there; and nobody reads them any more.
  __device__ uint32_t full(uint32_t stage) const { return start + barrier_start + 8 * stage; }
  __device__ uint32_t empty(uint32_t stage) const { return full(stages + stage); }
};

// A place in the ring of stages, and the parity of the round it is in.
struct Ring {
  uint32_t stage = 0, parity = 0;

  __device__ void advance() {
    stage = stage + 1 == stages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

}  // namespace rankwise::kernels
