// Multiplies what load_operands.h brings: a warpgroup's 64 rows of a tile, in its registers.
//
//   sums = sum over blocks of left block times right block; a term that is dropped from comes first
//          and is finished for that (drop_sums.h), else it comes last
//
//   block i      wait(full[i]); start its 4 products
//   block i - 1  is done when at most one group of products is under way: arrive(empty[i - 1])
//
// So one group of products always runs while the next one is started.
#pragma once

#include "product_tiles.h"

namespace rankwise::kernels {

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

// A tile's products in the order in which they are started.
template <typename T, bool right_by_row>
class TileProducts {
 public:
  __device__ TileProducts(const SharedTiles& shared, uint32_t group, Ring& ring,
                          float (&sums)[sums_each])
      : shared_(shared), group_(group), ring_(ring), sums_(sums) {}

  __device__ void start_product(const ProductArguments& p) {
    for (int block = 0; block < p.depth_blocks; ++block) start<4>();
  }

  __device__ void start_term(const ProductArguments& p) {
    for (int steps = p.tail_steps; steps > 0; steps -= 4) {
      if (steps >= 4) {
        start<4>();
      } else if (steps == 3) {
        start<3>();
      } else if (steps == 2) {
        start<2>();
      } else {
        start<1>();
      }
    }
  }

  // The sums of what was started, at least one block, are there; further products are added.
  __device__ void finish() {
    products_wait<0>();
    pin(sums_);
    release(shared_, before_);
    under_way_ = false;
  }

 private:
  template <int steps>
  __device__ void start() {
    barrier_wait(shared_.full(ring_.stage), ring_.parity);
    start_products<T, right_by_row, steps>(
        sums_, operands_of<right_by_row>(shared_, ring_.stage, group_), begun_);
    products_wait<1>();
    if (under_way_) release(shared_, before_);
    begun_ = under_way_ = true;
    before_ = ring_.stage;
    ring_.advance();
  }

  const SharedTiles& shared_;
  const uint32_t group_;
  Ring& ring_;
  float (&sums_)[sums_each];
  bool begun_ = false, under_way_ = false;
  uint32_t before_ = 0;  // the stage of the last group
};

}  // namespace rankwise::kernels
