// Products whose inner size is the tokens, on the micro-kernel: the factors' gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>

#include "panel_products.h"

namespace rankwise {

// The left operand of a sum over tokens: of m [tokens, rank] blocks [rank, token_run] of transposed
// rows, the last one padded by zeros.
inline at::Tensor empty_blocks(const at::Tensor& m, int64_t tokens, int64_t rank) {
  return empty_like(m, Split(tokens, token_run).count() * rank, token_run);
}

// Fills the block of `rows` of m; nothing where `blocks` is undefined.
template <typename F>
void transpose_block(const at::Tensor& m, Range rows, int64_t rank, const at::Tensor& blocks) {
  if (!blocks.defined()) return;
  const Elements<F> from(m);
  F* row = blocks.mutable_data_ptr<F>() + rows.start * rank;
  for (int64_t i = 0; i < rank; ++i, row += token_run) {
    for (int64_t k = 0; k < rows.size; ++k) row[k] = from(rows.start + k, i);
    std::fill(row + rows.size, row + token_run, F(0));
  }
}

// left^T m[:, cols], [rank, cols.size], for `left` in transposed blocks; the thread's memory.
template <typename T, typename F>
float* sum_over_tokens(const at::Tensor& left, int64_t rank, const at::Tensor& m, Range cols,
                       const Kept& kept) {
  const MicroKernelUse<F> use_of_kernel;
  const int64_t width = cols.size;
  const Split blocks(m.size(0), token_run);
  float* const sums = scratch<float>(Slot::sums, rank * width);
  if (blocks.count() == 0) std::fill_n(sums, rank * width, 0.0F);
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const int64_t count = blocks[b].size;
    const auto inner = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(count)));
    const int64_t padded = inner_padded<F>(inner);  // of few values: each has its own kernel
    Rows<const F> right = load<F, T>(m, blocks[b], cols, kept);
    if (sizeof(F) == 2 || count < padded) {
      F* const panel = scratch<F>(Slot::panel, padded * width);
      pack<F>({right.data, right.stride, 1}, count, width, panel, width);
      std::fill(panel + inner_padded<F>(count) * width, panel + padded * width, F(0));
      right = {panel, width};
    }
    multiply_block<F>(rank, width, padded, left.const_data_ptr<F>() + b * rank * token_run,
                      token_run, right.data, right.stride, sums, width, /*accumulate=*/b > 0);
  }
  return sums;
}

}  // namespace rankwise
