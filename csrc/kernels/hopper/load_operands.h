// Brings the operands of all of a block's tiles, one thread's work: for each tile the blocks of 64
// along the depth, then those along the rank; a term that is dropped from comes first.
//
//   this thread                     copy engine              multiplying warps
//   wait(empty[i]) <------------------------------------------ arrive(empty[i]), 8 warps
//   expect(full[i], 48 KiB)
//   load left, right ------------>  bytes to full[i] --------> wait(full[i])
//
// On a new barrier the wait for parity 1 does not wait: the first round finds all stages empty.
#pragma once

#include "beside_product.h"
#include "product_tiles.h"

namespace rankwise::kernels {

// A block of 64 along the depth, from `depth` on, of one tile.
template <bool right_by_row>
__device__ inline void load_block(const TensorMap& left, const TensorMap& right,
                                  const SharedTiles& shared, const Ring& ring,
                                  const TilePlace& place, int depth) {
  const uint32_t full = shared.full(ring.stage), to = shared.right(ring.stage);
  barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
  barrier_expect(full, left_bytes + right_bytes);
  load_box(shared.left(ring.stage), left, full, depth, place.row);
  if constexpr (right_by_row) {
#pragma unroll
    for (int i = 0; i < tile_cols / box_cols; ++i) {
      load_box(to + i * right_box_bytes, right, full, place.col + i * box_cols, depth);
    }
  } else {
    load_box(to, right, full, depth, place.col);
  }
}

// `flagged`: the tail's left matrix is written meanwhile, a flag for each row tile.
template <bool right_by_row, bool tail_first, bool flagged>
__device__ inline void load_operands(const ProductArguments& p, const SharedTiles& shared,
                                     const Share& share) {
  const int tiles = p.tiles_down * p.tiles_across, blocks = p.depth_blocks + p.tail_blocks();
  const int first_of_second = tail_first ? p.tail_blocks() : p.depth_blocks;
  Ring ring;
  for (int tile = share.first; tile < tiles; tile += share.step) {
    const TilePlace place = place_of(p, tile);
    for (int block = 0; block < blocks; ++block) {
      const bool second = block >= first_of_second, tail = second != tail_first;
      if (flagged && tail) wait_for_term(p, place.row);
      load_block<right_by_row>(tail ? p.tail_left : p.left, tail ? p.tail_right : p.right, shared,
                               ring, place,
                               (second ? block - first_of_second : block) * tile_depth);
      ring.advance();
    }
  }
}

}  // namespace rankwise::kernels
