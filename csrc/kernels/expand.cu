// scale * H F for H [rows, rank] and F [rank, cols], masked or added to a bias or to rows of a
// table: what is written is touched once, and rounded once.
#include "fragments.h"
#include "skinny_products.h"
#include "table_row.h"

namespace rankwise::kernels {
namespace {

// How many parts a float32 factor needs for results of type Wide: 16 bits of each number are plenty
// where the result is rounded to 11.
template <typename Wide, typename Factor>
constexpr int parts_for = std::is_same_v<Wide, Factor> && sizeof(Wide) == 2 ? 1
                          : sizeof(Wide) == 2                               ? 2
                                                                            : 3;

// out = scale * mask(sum).
struct Masked {
  DropoutMask dropout;
};

// out = the bias + scale * sum.
template <typename Wide>
struct OnBias {
  View<Wide> bias;  // one row
};

// out = the row's row of the table + scale * sum.
template <typename Wide>
struct OnTable {
  View<Wide> table;
  RowIndices rows;
};

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

// A pair of float32 numbers as `parts` pairs of bfloat16, largest first. Two parts are rounded, so
// that the product of the two second ones may be left out.
template <int parts_>
__device__ inline void cut_operand(float low, float high, uint32_t (&parts)[parts_]) {
  if constexpr (parts_ == 2) {
    const auto round = [](float value) {
      const uint32_t bits = as_bits(value);
      const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u;
      // Not beyond the largest number.
      return (rounded & 0x7F800000u) == 0x7F800000u ? bits & 0xFFFF0000u : rounded;
    };
    const uint32_t first_low = round(low), first_high = round(high);
    parts[0] = first_low >> 16 | first_high;
    parts[1] = round(low - as_float(first_low)) >> 16 | round(high - as_float(first_high));
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

// sums += a b, smallest products first; of two parts, without that of the two second ones.
template <typename Mma, int parts>
__device__ inline void multiply_parts(float (&sums)[4], const uint32_t (&a)[parts][4],
                                      const uint32_t (&b)[parts][4], int n) {
#pragma unroll
  for (int order = parts == 2 ? 1 : 2 * parts - 2; order >= 0; --order) {
#pragma unroll
    for (int p = 0; p < parts; ++p) {
      if (order - p < 0 || order - p >= parts) continue;
      const uint32_t column[2] = {b[order - p][n], b[order - p][n + 2]};
      multiply_add<Mma>(sums, a[p], column);
    }
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
        multiply_parts<typename P::Mma>(sums[i][n], a[i], b, 0);
        multiply_parts<typename P::Mma>(sums[i][n + 1], a[i], b, 1);
      }
    }
  }
}

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

  // Row i alone: it is written before the next one is read.
  __device__ void take(const Sums& sums, float scale, const OnTable<Wide>& from, int i) {
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
  __device__ void read(const OnTable<Wide>& from, int i) {
    if (row + 8 * i >= shape.rows) return;
    const Wide* start = from.table.data + row_at(from.rows, row + 8 * i) * from.table.stride + col;
#pragma unroll
    for (int j = 0; j < across; ++j) {
      pieces[i][j].load(start + 32 * j, count(i, j), from.table.alignment);
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

template <typename Types, int rank_tile, bool by_column, typename Source>
__global__ void __launch_bounds__(Plan<Types, rank_tile>::threads,
                                  Plan<Types, rank_tile>::blocks_at_once)
    expand(View<typename Types::Factor> hidden, View<typename Types::Factor> factor, float scale,
           Source source, View<typename Types::Wide> shape, typename Types::Wide* out) {
  using P = Plan<Types, rank_tile>;
  constexpr bool masked = std::is_same_v<Source, Masked>;
  constexpr bool on_table = std::is_same_v<Source, OnTable<typename Types::Wide>>;
  auto* hidden_tile = dynamic_shared<typename P::Number>();
  auto* factor_tile = hidden_tile + P::parts * P::hidden_plane;
  const auto across = static_cast<unsigned>((shape.cols + P::col_tile - 1) / P::col_tile);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / across) * P::row_tile;
  const int64_t first_col = static_cast<int64_t>(blockIdx.x % across) * P::col_tile;
  const int64_t rank = hidden.cols;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_col = warp % P::col_warps * P::warp_cols;
  uint64_t seed = 0;
  if constexpr (masked) {
    if (source.dropout.threshold > 0) seed = static_cast<uint64_t>(*source.dropout.seed);
  }

#pragma unroll 1
  for (int step = 0; step < P::row_tile; step += P::step_rows) {
    if (first_row + step >= shape.rows) break;
    const int warp_row = step + warp / P::col_warps * P::warp_rows;
    float sums[P::warp_rows / 16][P::warp_cols / 8][4] = {};
#pragma unroll 1
    for (int64_t first = 0; first < rank; first += rank_tile) {
      if (step == 0 || rank > rank_tile) {
        if (step > 0 || first > 0) __syncthreads();
        load_rows<P, P::row_tile>(hidden_tile, P::hidden_plane, {hidden, first_row, first},
                                  [](int row) { return P::hidden_place(row); });
        if constexpr (by_column) {
          load_rows<P, P::col_tile>(factor_tile, P::factor_plane, {factor, first_col, first},
                                    [](int col) { return P::factor_place(col); });
        } else {
          load_columns<P>(factor_tile, {factor, first, first_col});
        }
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
      }
      multiply<P>(hidden_tile + P::hidden_place(warp_row), factor_tile + P::factor_place(warp_col),
                  clamped(rank - first, rank_tile), sums);
    }
    Result<P> result(shape, first_row + warp_row, first_col + warp_col);
    if constexpr (on_table) {
#pragma unroll
      for (int i = 0; i < result.down; ++i) {
        result.take(sums, scale, source, i);
        result.write(out, i);
      }
    } else {
      result.take(sums, scale, source);
      if constexpr (masked) {
        if (source.dropout.threshold > 0) result.drop(seed, (source.dropout.threshold << 16) - 1);
      }
      result.write(out);
    }
  }
}

template <typename Types, int rank_tile, bool by_column, typename Source>
int launch_one(const Expand& problem, const Source& source, void* stream) {
  using P = Plan<Types, rank_tile>;
  const auto hidden =
      view<typename P::Factor>(problem.hidden, problem.rows, problem.rank, problem.rank);
  const auto factor =
      view<typename P::Factor>(problem.factor, by_column ? problem.cols : problem.rank,
                               by_column ? problem.rank : problem.cols, problem.factor_stride);
  const auto shape =
      view<typename P::Wide>(problem.out, problem.rows, problem.cols, problem.out_stride);
  const int64_t blocks =
      divide_up(problem.rows, P::row_tile) * divide_up(problem.cols, P::col_tile);
  return launch(expand<Types, rank_tile, by_column, Source>, static_cast<unsigned>(blocks),
                P::threads, P::shared_bytes, stream, hidden, factor, problem.scale, source, shape,
                static_cast<typename P::Wide*>(problem.out));
}

template <typename Types, bool by_column, typename Source>
int launch_by_rank(const Expand& problem, const Source& source, void* stream) {
  constexpr int many = parts_for<typename Types::Wide, typename Types::Factor> == 3 ? 32 : 64;
  return problem.rank <= 16 ? launch_one<Types, 16, by_column>(problem, source, stream)
                            : launch_one<Types, many, by_column>(problem, source, stream);
}

}  // namespace

int launch_expand(const Expand& problem, void* stream) {
  if (problem.bias && (!problem.transposed || problem.dropout.threshold > 0)) {
    return cudaErrorInvalidValue;
  }
  if (problem.rows == 0 || problem.cols == 0) return cudaSuccess;
  const Masked masked{problem.dropout};
  return with_types(problem.wide_type, problem.factor_type, [&](auto types) {
    using Types = decltype(types);
    using Wide = typename Types::Wide;
    if (!problem.transposed) return launch_by_rank<Types, false>(problem, masked, stream);
    if (!problem.bias) return launch_by_rank<Types, true>(problem, masked, stream);
    const OnBias<Wide> result{view<Wide>(problem.bias, 1, problem.cols, 0)};
    return launch_by_rank<Types, true>(problem, result, stream);
  });
}

int launch_embedding_output(const EmbeddingOutput& p, void* stream) {
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  const Expand product{p.rows,     p.cols, p.rank,    p.wide_type, p.factor_type, p.gated,     p.B,
                       p.B_stride, true,   p.scaling, {},          p.out,         p.out_stride};
  return with_types(p.wide_type, p.factor_type, [&](auto types) {
    using Types = decltype(types);
    using Wide = typename Types::Wide;
    const OnTable<Wide> result{view<Wide>(p.table, p.indices.table_rows, p.cols, p.table_stride),
                               p.indices};
    return launch_by_rank<Types, true>(product, result, stream);
  });
}

}  // namespace rankwise::kernels
