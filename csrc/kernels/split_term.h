// Float32 factors as bfloat16 for hopper/linear_product.h: launchers over raw pointers, no torch.
//
// A term that joins its sums:
//
//   v = high(v) + low(v), each rounded to bfloat16:  an error of at most 2^-16 |v|
//   s B = [high(s) low(s) high(s)] [high(B) high(B) low(B)]:  low(s) low(B) is left out
//
// so that the term, of three times as many directions, is wrong by at most 3 * 2^-16 of its sum of
// absolute products. What is not finite has no low part, and the zero beside it never meets it:
// the term is infinite or NaN where that of float32 is.
//
// A and dh of passes beside it, whose sums are float32's: v is cut into three parts of eight bits
// each, whose sum it is and of which none is zero but those of zero (number_parts.h).
#pragma once

#include <cstdint>

namespace rankwise::kernels {

constexpr int64_t split_parts = 3;

// `from` [rows, cols]; `to` gets its three parts, bfloat16, with rows of unit column stride, each
// part `part_stride` elements behind the one before.
struct SplitMatrix {
  int64_t rows = 0, cols = 0;
  const float* from = nullptr;
  int64_t row_stride = 0, col_stride = 0;
  void* to = nullptr;
  int64_t to_stride = 0, part_stride = 0;
};

// `from` [rank, length], up to 16 directions; `to` gets its parts, part p of direction i in row
// 16 p + i, and zeros in rows of no direction: [cut_rows, length].
constexpr int64_t cut_rank = 16, cut_rows = 3 * cut_rank;
struct CutFactor {
  int64_t rank = 0, length = 0;
  const float* from = nullptr;
  int64_t from_stride = 0;
  void* to = nullptr;
  int64_t to_stride = 0;
};

// Both, at least 1 row and column each. `stream` is a cudaStream_t; returns a cudaError_t or 0.
int launch_split_term(const SplitMatrix& left, const SplitMatrix& right, void* stream);
// A, and the term's right matrix.
int launch_cut_factor(const CutFactor& factor, const SplitMatrix& right, void* stream);

}  // namespace rankwise::kernels
