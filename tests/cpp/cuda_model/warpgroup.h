// Products of a warpgroup (wgmma) with both operands in shared memory, in the layouts of the PTX
// ISA
// ("Asynchronous warpgroup level matrix multiply-accumulate"): each warp has 16 of the 64 rows.
//
// An operand is a descriptor: bits 0-13 the start, 16-29 the leading and 32-45 the stride offset,
// all in units of 16 bytes; bits 62-63 are 1 for the 128-byte swizzle, the only one here.
#pragma once

#include "grid.h"

namespace cuda_model {

struct GroupProduct {
  float* sums;  // of the lane: cols / 2 numbers; poison until the product has been waited for
  uint64_t left, right;
  bool keep;          // adds to the sums; else they begin at 0
  bool right_by_row;  // right is [16, cols] with rows of 64 columns; else [cols, 16] by column
  int cols;
  bool left_by_row = false;  // left is [16, 64] with rows of 64 columns; else [64, 16]
};

// Before the first product, and after sums were touched.
void products_fence(const Site& site);
template <typename T>
void multiply_group(const GroupProduct& product, const Site& site);
void products_commit(const Site& site);
// Products happen at the latest here, or when they are started with early copies.
void products_wait(int pending_groups, const Site& site);

// stmatrix: four matrices of 8 x 8 16-bit elements to shared memory; lane i gives the address of
// row i % 8 of matrix i / 8.
void store_matrices(uint32_t row, const uint32_t* fragment, const Site& site);

}  // namespace cuda_model
