// Passes over x that some blocks do beside the product (linear_product.h), through the same ring:
// two boxes of x [128, 64] to a stage and, in the place behind them, what they meet.
//
//   forward   s = x A^T         boxes side by side; A's two boxes [16 directions, 64]
//             gated rows to the term's left matrix, then
//               8 warps raise the flag of their row tile  --->  its tiles load the term
//   gradient  partial = x^T dh  boxes side by side, 64 columns to each warpgroup; one box of dh
//
// Of float32 factors the parts (split_term.h) lie side by side, 48 directions in the place of 16,
// and their sums leave the tensor core after each 16 products (../fragments.h).
//
// Blocks that raise flags are those that began first, by the tickets they draw: who waits for a
// flag waits for a block that runs and itself waits for nobody.
#pragma once

#include "../split_parts.h"
#include "multiply_operands.h"
#include "product_tiles.h"

namespace rankwise::kernels {

constexpr int beside_sums = group_rows * beside_directions / warpgroup;  // of a thread

struct Role {
  bool beside;
  Share share;
};

// Of the whole block. `in_order`: the first to begin are those beside.
template <bool in_order>
__device__ inline Role role_of_block(const BesideArguments& p) {
  const int tiles_too = static_cast<int>(gridDim.x) - p.blocks;
  int number = static_cast<int>(blockIdx.x);
  if constexpr (in_order) {
    __shared__ uint32_t ticket;
    if (threadIdx.x == 0) ticket = take_ticket(p.flags);
    __syncthreads();
    number = static_cast<int>(ticket);
  }
  if (number < p.blocks) return {true, {number, p.blocks}};
  return {false, {number - p.blocks, tiles_too}};
}

// Before a tile's term is loaded.
__device__ inline void wait_for_term(const ProductArguments& p, int row) {
  wait_for_flag(p.beside.flags + 1 + row / tile_rows, multiplying_warps);
}

// One sum of a pass: steps of 128 along what it sums over.
struct BesideItem {
  int row, col;     // of x, the first ones
  int first, last;  // steps
  int slice;
};

template <bool by_row>
__device__ inline int beside_items(const ProductArguments& p) {
  if constexpr (!by_row) return p.tiles_down;
  const int strips = (p.cols + tile_rows - 1) / tile_rows;
  return strips * ((p.tiles_down + p.beside.chunk - 1) / p.beside.chunk);
}

template <bool by_row>
__device__ inline BesideItem beside_item(const ProductArguments& p, int i) {
  if constexpr (!by_row) return {i * tile_rows, 0, 0, (p.depth_blocks + 1) / 2, 0};
  const int strips = (p.cols + tile_rows - 1) / tile_rows;
  const int first = i / strips * p.beside.chunk, end = first + p.beside.chunk;
  return {0, i % strips * tile_rows, first, end < p.tiles_down ? end : p.tiles_down, i / strips};
}

template <bool by_row, bool cut>
__device__ inline void load_beside(const ProductArguments& p, const SharedTiles& shared,
                                   const Share& share) {
  const TensorMap& x = by_row ? p.beside.x : p.left;
  Ring ring;
  for (int i = share.first; i < beside_items<by_row>(p); i += share.step) {
    const BesideItem item = beside_item<by_row>(p, i);
    for (int step = item.first; step < item.last; ++step) {
      const uint32_t full = shared.full(ring.stage),
                     skinny = shared.right(ring.stage) + beside_start;
      const int along = step * 2 * tile_depth;  // rows of dh, or the depth
      const int row = by_row ? along : item.row, col = by_row ? item.col : along;
      barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      barrier_expect(full, 2 * left_bytes + (by_row ? left_bytes : 2 * beside_box_bytes(cut)));
      load_box(shared.left(ring.stage), x, full, col, row);
      load_box(shared.right(ring.stage), x, full, col + box_cols, row);
      if constexpr (by_row) {
        load_box(skinny, p.beside.skinny, full, 0, along);
      } else {
        load_box(skinny, p.beside.skinny, full, along, 0);
        load_box(skinny + beside_box_bytes(cut), p.beside.skinny, full, along + box_cols, 0);
      }
      ring.advance();
    }
  }
}

constexpr int beside_steps = 2 * tile_depth / step_depth;  // of a stage

// The operands of step i of a stage. By row a warpgroup has a box; else each box is a half of the
// depth.
template <bool by_row, bool cut>
__device__ inline Operands beside_operands(const SharedTiles& shared, uint32_t stage,
                                           uint32_t group, int i) {
  constexpr int half = beside_steps / 2;
  const bool second = by_row ? group == 1 : i >= half;
  const uint32_t wide = (second ? shared.right(stage) : shared.left(stage)) +
                        (by_row ? 0 : group * group_rows * tile_depth * 2);
  const uint32_t skinny =
      shared.right(stage) + beside_start + (by_row || i < half ? 0 : beside_box_bytes(cut));
  const uint64_t along = (by_row ? i : i % half) * operand_step(by_row);
  return {(operand_layout(by_row) | wide >> 4) + along,
          (operand_layout(by_row) | skinny >> 4) + along};
}

// Starts the products of a stage, in one group.
template <typename T, bool by_row>
__device__ inline void start_beside(float (&sums)[beside_sums], const SharedTiles& shared,
                                    uint32_t stage, uint32_t group, bool keep) {
  pin(sums);
  products_fence();
#pragma unroll
  for (int i = 0; i < beside_steps; ++i) {
    const Operands of = beside_operands<by_row, false>(shared, stage, group, i);
    multiply_narrow<T, by_row>(sums, of.left, of.right, keep || i > 0);
  }
  products_commit();
  pin(sums);
}

// Adds a stage's products with parts to the sums, two steps at a time.
template <typename T, bool by_row>
__device__ inline void add_parts(float (&sums)[beside_sums], const SharedTiles& shared,
                                 uint32_t stage, uint32_t group) {
#pragma unroll
  for (int i = 0; i < beside_steps; i += 2) {
    float of_step[2][3 * beside_sums];
    pin(of_step[0]);
    pin(of_step[1]);
    products_fence();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Operands of = beside_operands<by_row, true>(shared, stage, group, i + j);
      multiply_narrow<T, by_row>(of_step[j], of.left, of.right, false);
    }
    products_commit();
    products_wait<0>();
    pin(of_step[0]);
    pin(of_step[1]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int k = 0; k < beside_sums; ++k) {
        const float small = of_step[j][2 * beside_sums + k] + of_step[j][beside_sums + k];
        sums[k] += small + of_step[j][k];
      }
    }
  }
}

// Of factors of type F.
template <typename F>
__device__ inline void store_shrunk(const ProductArguments& p, int row, int direction, float sum) {
  const BesideArguments& b = p.beside;
  if (row >= p.rows || direction >= b.rank) return;
  const float gate = b.E ? static_cast<float>(static_cast<const F*>(b.E)[direction]) : 1.0f;
  const float gated = b.scale * (sum * gate);
  static_cast<F*>(b.hidden)[static_cast<int64_t>(row) * b.rank + direction] = F(sum);
  const int64_t at = row * b.term_stride + direction;
  if constexpr (std::is_same_v<F, float>) {
    store_split(static_cast<__nv_bfloat16*>(b.term) + at, b.rank, gated, /*of_left=*/true);
  } else {
    static_cast<F*>(b.term)[at] = F(gated);
  }
}

__device__ inline void store_partial(const ProductArguments& p, int slice, int col, int direction,
                                     float sum) {
  const int pitch = (p.beside.rank + 7) / 8 * 8;
  if (col >= p.cols || direction >= pitch) return;
  p.beside.partial[(static_cast<int64_t>(slice) * p.cols + col) * pitch + direction] = sum;
}

template <typename F, bool by_row>
__device__ inline void store_beside(const ProductArguments& p, const BesideItem& item, int first,
                                    const float (&sums)[beside_sums]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int i = 0; i < beside_sums; ++i) {
    const int row = first + lane / 4 + 8 * (i / 2 % 2);
    const int direction = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    if constexpr (by_row) {
      store_partial(p, item.slice, item.col + row, direction, sums[i]);
    } else {
      store_shrunk<F>(p, item.row + row, direction, sums[i]);
    }
  }
  if constexpr (!by_row) {
    fence_device_writes();
    __syncwarp();
    if (lane == 0) raise_flag(p.beside.flags + 1 + item.row / tile_rows);
  }
}

template <typename T, bool by_row, bool cut>
__device__ inline void multiply_beside(const ProductArguments& p, const SharedTiles& shared,
                                       uint32_t group, const Share& share) {
  const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x % warpgroup / 32, 0);
  const int first = static_cast<int>(group * group_rows + warp * 16);
  Ring ring;
  float sums[beside_sums];
  for (int i = share.first; i < beside_items<by_row>(p); i += share.step) {
    const BesideItem item = beside_item<by_row>(p, i);
    uint32_t before = 0;
    if constexpr (cut) {
#pragma unroll
      for (int k = 0; k < beside_sums; ++k) sums[k] = 0.0f;
    }
    for (int step = item.first; step < item.last; ++step) {
      barrier_wait(shared.full(ring.stage), ring.parity);
      if constexpr (cut) {
        add_parts<T, by_row>(sums, shared, ring.stage, group);
        release(shared, ring.stage);
      } else {
        start_beside<T, by_row>(sums, shared, ring.stage, group, step > item.first);
        products_wait<1>();
        if (step > item.first) release(shared, before);
        before = ring.stage;
      }
      ring.advance();
    }
    if constexpr (!cut) {
      products_wait<0>();
      pin(sums);
      release(shared, before);
    }
    store_beside<std::conditional_t<cut, float, T>, by_row>(p, item, first, sums);
  }
}

}  // namespace rankwise::kernels
