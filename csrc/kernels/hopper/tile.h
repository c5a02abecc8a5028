// A tile of the product, how a block's shared memory holds what it is made of, and the names that
// wgmma takes for operands there.
//
//   0        stages x left  [128, 64]  a row has 64 numbers along the depth
//   64 KiB   stages x right [256, 64]  likewise; or, right_by_row, 4 boxes [64 deep, 64 columns]
//   192 KiB  8 warps x 2 x [16, 64]    results on their way to the copy engine
//   224 KiB  2 x stages barriers
//
// All boxes have rows of 128 bytes in the 128-byte swizzle and begin at multiples of 1024.
#pragma once

#include <cstdint>

#include "../host_device.h"
#include "../split_term.h"

namespace rankwise::kernels {

constexpr int tile_rows = 128, tile_cols = 256, tile_depth = 64, stages = 4;
constexpr int box_cols = 64;    // of every box: 128 bytes of 16-bit numbers
constexpr int step_depth = 16;  // of one wgmma

// One warpgroup brings operands, two multiply 64 rows each.
constexpr int warpgroup = 128, multiplying_warps = 8, group_rows = 64;
constexpr int product_threads = 3 * warpgroup;

constexpr uint32_t left_bytes = tile_rows * tile_depth * 2,
                   right_bytes = tile_cols * tile_depth * 2;
constexpr uint32_t right_box_bytes = tile_depth * box_cols * 2;
constexpr int result_rows = 16, result_buffers = 2;
constexpr uint32_t result_bytes = result_rows * box_cols * 2;

constexpr uint32_t right_start = stages * left_bytes;
constexpr uint32_t result_start = right_start + stages * right_bytes;
constexpr uint32_t barrier_start = result_start + multiplying_warps * result_buffers * result_bytes;
constexpr uint32_t box_alignment = 1024;

// Of work beside the product (beside_product.h): directions, three times as many of float32's
// parts, and where a stage has them.
constexpr int beside_directions = static_cast<int>(cut_rank);
RANKWISE_HOST_DEVICE constexpr int beside_rows(bool cut) {
  return static_cast<int>(cut ? cut_rows : cut_rank);
}
RANKWISE_HOST_DEVICE constexpr uint32_t beside_box_bytes(bool cut) {
  return static_cast<uint32_t>(beside_rows(cut) * tile_depth * 2);
}
constexpr uint32_t beside_start = left_bytes;  // in the place of `right`
static_assert(beside_start + left_bytes <= right_bytes, "");
static_assert(2 * beside_box_bytes(true) <= left_bytes, "");
constexpr uint32_t product_shared_bytes = barrier_start + 2 * stages * 8 + box_alignment;

// Operands in wgmma's descriptors, in units of 16 bytes: groups of 8 rows are 1024 bytes apart, and
// of a right operand by row, groups of 64 columns a box.
RANKWISE_HOST_DEVICE constexpr uint64_t operand_layout(bool by_row) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62, row_groups = uint64_t{1024 / 16} << 32;
  const uint64_t column_groups = uint64_t{right_box_bytes / 16} << 16;
  return swizzle_128 | row_groups | (by_row ? column_groups : 0);
}
// From one step of 16 to the next along the depth: 32 bytes of every row, or 16 rows.
RANKWISE_HOST_DEVICE constexpr uint64_t operand_step(bool by_row) {
  return (by_row ? step_depth * 128 : step_depth * 2) / 16;
}

}  // namespace rankwise::kernels
