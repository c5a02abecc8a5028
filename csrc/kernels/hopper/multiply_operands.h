// Multiplies what load_operands.h brings: a warpgroup's 64 rows of a tile, in its registers.
//
//   sums = sum over blocks of left block times right block, the tail's blocks last
//
//   block i      wait(full[i]); start its 4 products
//   block i - 1  is done when at most one group of products is under way: arrive(empty[i - 1])
//
// So one group of products always runs while the next one is started.
#pragma once

#include "product_tiles.h"

namespace rankwise::kernels {

constexpr int sums_each = group_rows * tile_cols / warpgroup;  // of a thread

// The warpgroup's operands in a stage, as wgmma takes them.
struct Operands {
  uint64_t left, right;
};

template <bool right_by_row>
__device__ inline Operands operands_of(const SharedTiles& shared, uint32_t stage, uint32_t group) {
  const uint32_t left = shared.left(stage) + group * group_rows * tile_depth * 2;
  return {operand_layout(false) | left >> 4,
          operand_layout(right_by_row) | shared.right(stage) >> 4};
}

// Starts `steps` products of 16 along the depth, in one group.
template <typename T, bool right_by_row, int steps>
__device__ inline void start_products(float (&sums)[sums_each], const Operands& from, bool keep) {
  pin(sums);
  products_fence();
#pragma unroll
  for (int i = 0; i < steps; ++i) {
    multiply_group<T, right_by_row>(sums, from.left + i * operand_step(false),
                                    from.right + i * operand_step(right_by_row), keep || i > 0);
  }
  products_commit();
  pin(sums);
}

// The stage's products are done in this warp.
__device__ inline void release(const SharedTiles& shared, uint32_t stage) {
  if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty(stage));
}

// Starts all products of a tile. The last group is still under way; its stage is returned.
template <typename T, bool right_by_row>
__device__ inline uint32_t start_tile(const ProductArguments& p, const SharedTiles& shared,
                                      uint32_t group, Ring& ring, float (&sums)[sums_each]) {
  uint32_t before = 0;
  for (int block = 0; block < p.depth_blocks; ++block) {
    barrier_wait(shared.full(ring.stage), ring.parity);
    start_products<T, right_by_row, 4>(sums, operands_of<right_by_row>(shared, ring.stage, group),
                                       block > 0);
    products_wait<1>();
    if (block > 0) release(shared, before);
    before = ring.stage;
    ring.advance();
  }
  for (int steps = p.tail_steps; steps > 0; steps -= 4) {
    barrier_wait(shared.full(ring.stage), ring.parity);
    const Operands from = operands_of<right_by_row>(shared, ring.stage, group);
    if (steps >= 4) {
      start_products<T, right_by_row, 4>(sums, from, true);
    } else if (steps == 3) {
      start_products<T, right_by_row, 3>(sums, from, true);
    } else if (steps == 2) {
      start_products<T, right_by_row, 2>(sums, from, true);
    } else {
      start_products<T, right_by_row, 1>(sums, from, true);
    }
    products_wait<1>();
    release(shared, before);
    before = ring.stage;
    ring.advance();
  }
  return before;
}

// The sums are there.
__device__ inline void finish_tile(const SharedTiles& shared, uint32_t last_stage,
                                   float (&sums)[sums_each]) {
  products_wait<0>();
  pin(sums);
  release(shared, last_stage);
}

}  // namespace rankwise::kernels
