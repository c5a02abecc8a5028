// expand's plan and operands: parts of 16 bits of H and F in shared memory, and their product in a
// warp's registers.
#pragma once

#include "fragments.h"
#include "skinny_products.h"

namespace rankwise::kernels {

// How many parts a float32 factor needs for results of type Wide: 16 bits of each number are plenty
// where the result is rounded to 11.
template <typename Wide, typename Factor>
constexpr int parts_for = std::is_same_v<Wide, Factor> && sizeof(Wide) == 2 ? 1
                          : sizeof(Wide) == 2                               ? 2
                                                                            : 3;

// A block keeps its part of the factor in shared memory and goes through its rows: warps stand
// beside one another along the columns, and below one another. Both operands lie there as parts of
// 16 bits, with the directions contiguous.
template <typename Types, int rank_tile_>
struct Plan {
  using Wide = typename Types::Wide;
  using Factor = typename Types::Factor;
  using Number = Multiplied<Wide, Factor>;
  using Mma = Number;
  static constexpr int parts = parts_for<Wide, Factor>;
  static constexpr int rank_tile = rank_tile_;
  static constexpr int warps = 8, threads = 32 * warps;
  static constexpr int col_tile = parts * rank_tile <= 64 ? 256 : 128, row_tile = 128;
  static constexpr int warp_cols = 64, warp_rows = rank_tile == 16 ? 16 : 32;
  static constexpr int blocks_at_once = rank_tile == 16 && parts < 3 ? 3 : 2;
  static constexpr int col_warps = col_tile / warp_cols, row_warps = warps / col_warps;
  static constexpr int step_rows = row_warps * warp_rows;  // what all warps do at once
  static constexpr int pitch = rank_tile + piece;
  static constexpr int hidden_plane = row_tile * pitch;
  static constexpr int factor_plane = col_tile * pitch + col_tile / piece * 16;
  static constexpr int shared_bytes = parts * (hidden_plane + factor_plane) * 2;
  static_assert(shared_bytes <= largest_shared_bytes);

  // A gap after each eight columns: in a fragment, whose columns are {0, 1, 8, 9, ..}, no bank is
  // met twice.
  __device__ static int factor_place(int col) { return col * pitch + col / piece * 16; }
  __device__ static int hidden_place(int row) { return row * pitch; }
};

// The nearest bfloat16, as the upper half of a word; not beyond the largest number, and NaN stays.
__device__ inline uint32_t nearest(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = bits + 0x7FFFu + (bits >> 16 & 1);
  return ((bits & 0x7FFFFFFFu) < 0x7F7F8000u ? rounded : bits) & 0xFFFF0000u;
}

// A pair of float32 numbers as `parts` pairs of bfloat16, largest first. Two parts are rounded, so
// that the product of the two second ones may be left out. The second one may then be zero or have
// the other sign, which infinity must not meet: infinity is one and, as a second part, infinity.
template <int parts_>
__device__ inline void cut_operand(float low, float high, uint32_t (&parts)[parts_]) {
  if constexpr (parts_ == 2) {
    const auto first = [](float value) {
      constexpr uint32_t from_infinity_to_one = 0x40000000u;
      const uint32_t bits = nearest(value);
      return (bits & 0x7FFFFFFFu) == 0x7F800000u ? bits ^ from_infinity_to_one : bits;
    };
    const uint32_t of_low = first(low), of_high = first(high);
    parts[0] = of_low >> 16 | of_high;
    parts[1] = nearest(low - as_float(of_low)) >> 16 | nearest(high - as_float(of_high));
  } else {
    cut(low, high, parts);
  }
}

// Starts to copy rows of [.., rank] that start at multiples of 16 bytes.
template <typename P, int tile_rows, typename Place>
__device__ void copy_rows(typename P::Number* tile, const Part<typename P::Factor>& part,
                          const Place& place) {
  using Geometry = Tile<typename P::Factor, tile_rows, P::rank_tile, P::threads>;
  const int row = Geometry::first_row(), col = Geometry::first_col();
  const int rows = clamped(part.matrix.rows - part.row, tile_rows);
  const int count = clamped(part.matrix.cols - part.col - col, piece);
  const typename P::Factor* from =
      part.matrix.data + (part.row + row) * part.matrix.stride + part.col + col;
#pragma unroll
  for (int i = 0; i < Geometry::each; ++i) {
    if (!Geometry::has(i)) continue;
    const int at = i * Geometry::row_step;
    const int valid = row + at < rows ? count : 0;
    copy_async<16>(tile + place(row + at) + col,
                   valid > 0 ? from + at * part.matrix.stride : part.matrix.data, 2 * valid);
  }
}

// Rows of [.., rank] as an operand, row i at place(i); what is copied asynchronously is to be
// waited for.
template <typename P, int tile_rows, typename Place>
__device__ void load_rows(typename P::Number* tile, int plane, const Part<typename P::Factor>& part,
                          const Place& place) {
  if constexpr (P::parts == 1) {
    if (part.matrix.alignment == 16) return copy_rows<P, tile_rows>(tile, part, place);
  }
  using Geometry = Tile<typename P::Factor, tile_rows, P::rank_tile, P::threads>;
  constexpr int batch = Geometry::each < 4 ? Geometry::each : 4;
  const int row = Geometry::first_row(), col = Geometry::first_col();
  const int rows = clamped(part.matrix.rows - part.row, tile_rows);
  const int count = clamped(part.matrix.cols - part.col - col, piece);
  const typename P::Factor* from =
      part.matrix.data + (part.row + row) * part.matrix.stride + part.col + col;
#pragma unroll
  for (int first = 0; first < Geometry::each; first += batch) {
    Piece<typename P::Factor> pieces[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int at = (first + i) * Geometry::row_step;
      const bool valid = Geometry::has(first + i) && row + at < rows;
      pieces[i].load(from + at * part.matrix.stride, valid ? count : 0, part.matrix.alignment);
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (!Geometry::has(first + i)) continue;
      typename P::Number* to = tile + place(row + (first + i) * Geometry::row_step) + col;
      if constexpr (P::parts == 1) {
        *reinterpret_cast<uint4*>(to) = pieces[i].word[0];
      } else {
        uint32_t pairs[piece / 2][P::parts];
#pragma unroll
        for (int j = 0; j < piece / 2; ++j) {
          cut_operand(pieces[i].value[2 * j], pieces[i].value[2 * j + 1], pairs[j]);
        }
#pragma unroll
        for (int p = 0; p < P::parts; ++p) {
          *reinterpret_cast<uint4*>(to + p * plane) =
              make_uint4(pairs[0][p], pairs[1][p], pairs[2][p], pairs[3][p]);
        }
      }
    }
  }
}

// Columns of a factor [rank, ..] as an operand. A lane has two directions and eight columns; a
// warp's lanes write to all banks at once.
template <typename P>
__device__ void load_columns(typename P::Number* tile, const Part<typename P::Factor>& part) {
  constexpr int rank_groups = P::rank_tile / 16, count = rank_groups * (P::col_tile / 32);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 2
  for (int first = 0; first < count; first += P::warps) {
    const int i = first + warp;
    if (count % P::warps != 0 && i >= count) break;
    const int rank = i % rank_groups * 16 + lane % 8 * 2;
    const int col = i / rank_groups * 32 + lane / 8 * piece;
    const int valid = clamped(part.matrix.cols - part.col - col, piece);
    Piece<typename P::Factor> pieces[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t row = part.row + rank + j;
      pieces[j].load(part.matrix.data + row * part.matrix.stride + part.col + col,
                     row < part.matrix.rows ? valid : 0, part.matrix.alignment);
    }
#pragma unroll
    for (int j = 0; j < piece; ++j) {
      typename P::Number* to = tile + P::factor_place(col + j) + rank;
      if constexpr (P::parts == 1) {
        const uint32_t words[2] = {reinterpret_cast<const uint32_t*>(pieces[0].word)[j / 2],
                                   reinterpret_cast<const uint32_t*>(pieces[1].word)[j / 2]};
        *reinterpret_cast<uint32_t*>(to) = j % 2 == 0 ? (words[0] & 0xFFFFu) | words[1] << 16
                                                      : words[0] >> 16 | (words[1] & 0xFFFF0000u);
      } else {
        uint32_t pair[P::parts];
        cut_operand(pieces[0].value[j], pieces[1].value[j], pair);
#pragma unroll
        for (int p = 0; p < P::parts; ++p) {
          *reinterpret_cast<uint32_t*>(to + p * P::factor_plane) = pair[p];
        }
      }
    }
  }
}

// sums += a b. Of two parts, the product of the two second ones is left out, and all sums stay in
// the tensor core: they are far better than their results of 16 bits.
template <typename P>
__device__ inline void add_parts(float (&sums)[4], const uint32_t (&a)[P::parts][4],
                                 const uint32_t (&b)[P::parts][4], int n) {
  if constexpr (P::parts < 3) {
    multiply_fragments<typename P::Mma, P::parts - 1>(sums, a, b, n);
  } else {
    add_fragments<typename P::Mma>(sums, a, b, n);
  }
}

// The warp's product over `ranks` directions. Column n of tile j of 32 columns is column
// 8 (n / 2) + 2 j + n % 2: a lane's sums of four tiles are eight neighbours, of one Philox block.
template <typename P>
__device__ void multiply(const typename P::Number* hidden, const typename P::Number* factor,
                         int ranks, float (&sums)[P::warp_rows / 16][P::warp_cols / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_col = lane % 8 / 2 * 8 + lane % 2 + lane / 8 % 2 * 2;
  const typename P::Number* columns = factor + P::factor_place(first_col) + lane / 16 * 8;
  const CutOperand<typename P::Number, P::pitch, false, P::parts, P::hidden_plane> rows{hidden};
#pragma unroll 1
  for (int k = 0; k < ranks; k += 16) {
    uint32_t a[P::warp_rows / 16][P::parts][4];
#pragma unroll
    for (int i = 0; i < P::warp_rows / 16; ++i) rows.load(16 * i, k, a[i]);
#pragma unroll
    for (int n = 0; n < P::warp_cols / 8; n += 2) {
      uint32_t b[P::parts][4];
      const int col = n / 4 * 32 + n % 4 * 2;  // what the tile adds to first_col
#pragma unroll
      for (int p = 0; p < P::parts; ++p) {
        load_matrices<false>(b[p], columns + p * P::factor_plane + P::factor_place(n / 4 * 32) +
                                       (col % 32) * P::pitch + k);
      }
#pragma unroll
      for (int i = 0; i < P::warp_rows / 16; ++i) {
        add_parts<P>(sums[i][n], a[i], b, 0);
        add_parts<P>(sums[i][n + 1], a[i], b, 1);
      }
    }
  }
}

}  // namespace rankwise::kernels
