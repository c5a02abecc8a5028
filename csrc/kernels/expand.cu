// scale * H F for H [rows, rank] and F [rank, cols], masked or added to rows of a table: what is
// written is touched once.
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

// out = the row's row of the table + scale * sum.
template <typename Wide>
struct OnTable {
  View<Wide> table;
  RowIndices rows;
};

template <typename Types, bool by_column, typename Result>
struct Plan {
  using Wide = typename Types::Wide;
  using Factor = typename Types::Factor;
  static constexpr int threads = 128;
  static constexpr int row_tile = 64, rank_tile = 64;
  static constexpr int col_tile = 256 / static_cast<int>(sizeof(Wide));
  // Two by two warps.
  static constexpr int warp_rows = row_tile / 2, warp_cols = col_tile / 2;
  static constexpr int parts = parts_for<Wide, Factor>;
  using Mma = Multiplied<Wide, Factor>;
  using HiddenTile = Tile<Factor, row_tile, rank_tile, threads>;
  using FactorTile = std::conditional_t<by_column, Tile<Factor, col_tile, rank_tile, threads>,
                                        Tile<Factor, rank_tile, col_tile, threads>>;
  using Rows = Operand<Factor, HiddenTile::pitch, false, parts>;
  using Columns = Operand<Factor, FactorTile::pitch, !by_column, parts>;
  using OutTile = Tile<Wide, row_tile, col_tile, threads>;
  static constexpr int operand_bytes = HiddenTile::bytes + FactorTile::bytes;
  // Rows of a table lie in the result's tile from the start; else it takes the operands' place.
  static constexpr bool on_table = !std::is_same_v<Result, Masked>;
  static constexpr int out_start = on_table ? operand_bytes : 0;
  static constexpr int out_end = out_start + OutTile::bytes;
  static constexpr int shared_bytes = operand_bytes > out_end ? operand_bytes : out_end;
  static_assert(shared_bytes <= largest_shared_bytes);
};

// The first row and column of the thread's warp.
template <typename P>
__device__ int2 warp_place() {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  return {warp / 2 * P::warp_rows, warp % 2 * P::warp_cols};
}

// Starts to copy the rows of the table that the tile's rows begin with.
template <typename P>
__device__ void copy_table_rows(typename P::Wide* tile, const Part<typename P::Wide>& part,
                                const OnTable<typename P::Wide>& from) {
  using OutTile = typename P::OutTile;
  OutTile::for_pieces(P::row_tile, P::col_tile, [&](int row, int col) {
    const int count = OutTile::valid(part, row, col);
    if (count == 0) return;
    const int64_t offset = row_at(from.rows, part.row + row) * from.table.stride + part.col + col;
    OutTile::copy_piece(tile + row * OutTile::pitch + col, from.table.data + offset, count,
                        from.table.alignment);
  });
  copy_async_commit();
}

// The sums, scaled, added to what the tile holds of a table, and rounded, as a tile of the result.
template <typename P>
__device__ void round_into(typename P::Wide* tile, const float (*sums)[P::warp_cols / 8][4],
                           float scale) {
  using Wide = typename P::Wide;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int2 place = warp_place<P>();
  const int row = place.x + lane / 4, col = place.y + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < P::warp_rows / 16; ++i) {
#pragma unroll
    for (int n = 0; n < P::warp_cols / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Wide* pair = tile + (row + 16 * i + 8 * half) * P::OutTile::pitch + col + 8 * n;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float sum = scale * sums[i][n][2 * half + j];
          pair[j] = Wide(P::on_table ? static_cast<float>(pair[j]) + sum : sum);
        }
      }
    }
  }
}

template <typename P>
__device__ void drop(typename P::Wide* tile, const Part<typename P::Wide>& part,
                     const DropoutMask& dropout) {
  if (dropout.threshold == 0) return;
  P::OutTile::drop(tile, part, static_cast<uint64_t>(*dropout.seed), dropout.threshold);
}

template <typename Types, bool by_column, typename Result>
__global__ void __launch_bounds__(128, 3)
    expand(View<typename Types::Factor> hidden, View<typename Types::Factor> factor, float scale,
           Result result, View<typename Types::Wide> shape, typename Types::Wide* out) {
  using P = Plan<Types, by_column, Result>;
  auto* hidden_tile = dynamic_shared<typename P::Factor>();
  auto* factor_tile = hidden_tile + P::HiddenTile::bytes / sizeof(typename P::Factor);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * P::row_tile;
  const int64_t col = static_cast<int64_t>(blockIdx.y) * P::col_tile;
  const int64_t rank = hidden.cols;
  const Part<typename P::Wide> part{shape, row, col};
  auto* tile = dynamic_shared<typename P::Wide>() + P::out_start / sizeof(typename P::Wide);
  if constexpr (P::on_table) copy_table_rows<P>(tile, part, result);

  const int2 place = warp_place<P>();
  const typename P::Rows rows{hidden_tile + place.x * P::HiddenTile::pitch};
  const typename P::Columns columns{factor_tile + place.y * (by_column ? P::FactorTile::pitch : 1)};
  float sums[P::warp_rows / 16][P::warp_cols / 8][4] = {};
  for (int64_t first = 0; first < rank; first += P::rank_tile) {
    const int ranks = static_cast<int>(rank - first < P::rank_tile ? rank - first : P::rank_tile);
    const int used = (ranks + 15) / 16 * 16;
    __syncthreads();
    P::HiddenTile::copy(hidden_tile, {hidden, row, first}, P::row_tile, used);
    if (by_column) {
      P::FactorTile::copy(factor_tile, {factor, col, first}, P::col_tile, used);
    } else {
      P::FactorTile::copy(factor_tile, {factor, first, col}, used, P::col_tile);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    multiply_tiles<typename P::Mma>(rows, columns, ranks, P::warp_cols, sums);
  }
  if constexpr (P::on_table) copy_async_wait<0>();  // nothing has waited where the rank is 0
  __syncthreads();
  round_into<P>(tile, sums, scale);
  __syncthreads();
  if constexpr (!P::on_table) drop<P>(tile, part, result.dropout);
  P::OutTile::for_pieces(P::row_tile, P::col_tile,
                         [&](int row, int col) { P::OutTile::write(tile, part, row, col, out); });
}

template <typename Types, bool by_column, typename Result>
int launch_one(const Expand& problem, const Result& result, void* stream) {
  using P = Plan<Types, by_column, Result>;
  const auto hidden =
      view<typename P::Factor>(problem.hidden, problem.rows, problem.rank, problem.rank);
  const auto factor =
      view<typename P::Factor>(problem.factor, by_column ? problem.cols : problem.rank,
                               by_column ? problem.rank : problem.cols, problem.factor_stride);
  const auto shape =
      view<typename P::Wide>(problem.out, problem.rows, problem.cols, problem.out_stride);
  const dim3 grid(static_cast<unsigned>(divide_up(problem.rows, P::row_tile)),
                  static_cast<unsigned>(divide_up(problem.cols, P::col_tile)));
  return launch(expand<Types, by_column, Result>, grid, P::threads, P::shared_bytes, stream, hidden,
                factor, problem.scale, result, shape, static_cast<typename P::Wide*>(problem.out));
}

}  // namespace

int launch_expand(const Expand& problem, void* stream) {
  if (problem.rows == 0 || problem.cols == 0) return cudaSuccess;
  const Masked result{problem.dropout};
  return with_types(problem.wide_type, problem.factor_type, [&](auto types) {
    using Types = decltype(types);
    return problem.transposed ? launch_one<Types, true>(problem, result, stream)
                              : launch_one<Types, false>(problem, result, stream);
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
    return launch_one<Types, true>(product, result, stream);
  });
}

}  // namespace rankwise::kernels
