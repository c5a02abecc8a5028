// expand's results: what a lane has of them, scaled, masked or added to what lies under them, and
// written once.
#pragma once

#include "expand_operands.h"
#include "table_row.h"

namespace rankwise::kernels {

// out = scale * mask(sum).
struct Masked {
  DropoutMask dropout;
};

// out = the bias + scale * sum.
template <typename Wide>
struct OnBias {
  View<Wide> bias;  // one row
};

// out = the base's row + scale * sum.
template <typename Wide>
struct OnBase {
  View<Wide> under;
  __device__ int64_t row_under(int64_t row) const { return row; }
};

// out = the row's row of the table + scale * sum.
template <typename Wide>
struct OnTable {
  View<Wide> under;
  RowIndices rows;
  __device__ int64_t row_under(int64_t row) const { return row_at(rows, row); }
};

template <typename Wide>
__device__ inline void round_pair(float low, float high, int i, Piece<Wide>& to) {
  if constexpr (std::is_same_v<Wide, float>) {
    to.value[2 * i] = low;
    to.value[2 * i + 1] = high;
  } else if constexpr (std::is_same_v<Wide, __nv_bfloat16>) {
    to.pair[i] = __floats2bfloat162_rn(low, high);
  } else {
    to.pair[i] = __floats2half2_rn(low, high);
  }
}

// What a lane has of a warp's result: piece (i, j) starts at row + 8 i, col + 32 j.
template <typename P>
struct Result {
  using Wide = typename P::Wide;
  using Sums = float[P::warp_rows / 16][P::warp_cols / 8][4];
  static constexpr int down = P::warp_rows / 8, across = P::warp_cols / 32;
  const View<Wide>& shape;
  int64_t row, col;
  bool whole;  // all of the warp's pieces are, and start at multiples of 16 bytes
  Piece<Wide> pieces[down][across];

  __device__ Result(const View<Wide>& out, int64_t warp_row, int64_t warp_col) : shape(out) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    row = warp_row + lane / 4;
    col = warp_col + lane % 4 * piece;
    whole = out.alignment == 16 && warp_row + P::warp_rows <= out.rows &&
            warp_col + P::warp_cols <= out.cols;
  }

  // How many elements of a piece the matrix has.
  __device__ int count(int i, int j) const {
    return row + 8 * i < shape.rows ? clamped(shape.cols - col - 32 * j, piece) : 0;
  }

  __device__ void take(const Sums& sums, float scale, const Masked&) {
#pragma unroll
    for (int i = 0; i < down; ++i) {
#pragma unroll
      for (int j = 0; j < across; ++j) round<false>(sums, scale, i, j, pieces[i][j]);
    }
  }

  __device__ void take(const Sums& sums, float scale, const OnBias<Wide>& from) {
#pragma unroll
    for (int j = 0; j < across; ++j) {
      Piece<Wide> bias;
      bias.load(from.bias.data + col + 32 * j, clamped(shape.cols - col - 32 * j, piece),
                from.bias.alignment);
#pragma unroll
      for (int i = 0; i < down; ++i) round<true>(sums, scale, i, j, bias);
    }
  }

  // Row i alone, on OnBase or OnTable: it is written before the next one is read.
  template <typename Source>
  __device__ void take(const Sums& sums, float scale, const Source& from, int i) {
    read(from, i);
#pragma unroll
    for (int j = 0; j < across; ++j) round<true>(sums, scale, i, j, pieces[i][j]);
  }

  __device__ void drop(uint64_t seed, uint32_t limit) {
    if (shape.cols % piece == 0) {
      const int64_t blocks = shape.cols / piece;
      const auto first = static_cast<uint64_t>(row * blocks + col / piece);
#pragma unroll
      for (int i = 0; i < down; ++i) {
        const uint64_t block = first + static_cast<uint64_t>(8 * i * blocks);
#pragma unroll
        for (int j = 0; j < across; ++j) {
          drop_block<Wide>(pieces[i][j].word, philox(block + 4 * j, seed), limit);
        }
      }
      return;
    }
    uint64_t bits = 0;  // eight for each piece
#pragma unroll 1
    for (int i = 0; i < down * across; ++i) {
      const int64_t index = (row + i / across * 8) * shape.cols + col + i % across * 32;
      bits |= static_cast<uint64_t>(kept(index, seed, limit) & 0xFF) << 8 * i;
    }
#pragma unroll
    for (int i = 0; i < down * across; ++i) {
      constexpr int words = Piece<Wide>::words;
#pragma unroll
      for (int k = 0; k < words; ++k) {
        uint4& word = pieces[i / across][i % across].word[k];
        word = drop_words<Wide>(word, static_cast<uint32_t>(bits >> 8 * i) >> k * (piece / words));
      }
    }
  }

  __device__ void write(Wide* out, int i) const {
    Wide* to = out + (row + 8 * i) * shape.stride + col;
#pragma unroll
    for (int j = 0; j < across; ++j) {
      pieces[i][j].store(to + 32 * j, count(i, j), shape.alignment);
    }
  }

  __device__ void write(Wide* out) const {
    if (whole) {
      Wide* to = out + row * shape.stride + col;
#pragma unroll
      for (int i = 0; i < down; ++i) {
#pragma unroll
        for (int j = 0; j < across; ++j) pieces[i][j].store(to + 32 * j, piece, 16);
        to += 8 * shape.stride;
      }
    } else {
#pragma unroll
      for (int i = 0; i < down; ++i) write(out, i);
    }
  }

 private:
  template <typename Source>
  __device__ void read(const Source& from, int i) {
    if (row + 8 * i >= shape.rows) return;
    const Wide* start = from.under.data + from.row_under(row + 8 * i) * from.under.stride + col;
#pragma unroll
    for (int j = 0; j < across; ++j) {
      pieces[i][j].load(start + 32 * j, count(i, j), from.under.alignment);
    }
  }

  // Piece (i, j) of the sums, scaled, on top of `base` or alone.
  template <bool on_top>
  __device__ void round(const Sums& sums, float scale, int i, int j, const Piece<Wide>& base) {
#pragma unroll
    for (int k = 0; k < piece / 2; ++k) {
      float low = scale * sums[i / 2][4 * j + k][i % 2 * 2];
      float high = scale * sums[i / 2][4 * j + k][i % 2 * 2 + 1];
      if constexpr (on_top) {
        low += static_cast<float>(base.value[2 * k]);
        high += static_cast<float>(base.value[2 * k + 1]);
      }
      round_pair(low, high, k, pieces[i][j]);
    }
  }
};

}  // namespace rankwise::kernels
