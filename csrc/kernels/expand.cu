// scale * H F for H [rows, rank] and F [rank, cols], masked or added to a bias, to a base's rows or
// to a table's: what is written is touched once, and rounded once.
#include "expand_result.h"

namespace rankwise::kernels {
namespace {

template <typename Types, int rank_tile, bool by_column, typename Source>
__global__ void __launch_bounds__(Plan<Types, rank_tile>::threads,
                                  Plan<Types, rank_tile>::blocks_at_once)
    expand(View<typename Types::Factor> hidden, View<typename Types::Factor> factor, float scale,
           Source source, View<typename Types::Wide> shape, typename Types::Wide* out) {
  using P = Plan<Types, rank_tile>;
  constexpr bool masked = std::is_same_v<Source, Masked>;
  constexpr bool row_by_row = !masked && !std::is_same_v<Source, OnBias<typename Types::Wide>>;
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
    if constexpr (row_by_row) {
#pragma unroll
      for (int i = 0; i < result.down; ++i) {
        result.take(sums, scale, source, i);
        result.write(out, i);
      }
    } else {
      result.take(sums, scale, source);
      if constexpr (masked) {
        if (source.dropout.threshold > 0)
          result.drop(seed, dropout_limit(source.dropout.threshold));
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
  const bool on_top = problem.bias || problem.base;
  if (on_top &&
      (!problem.transposed || problem.dropout.threshold > 0 || (problem.bias && problem.base))) {
    return cudaErrorInvalidValue;
  }
  if (problem.rows == 0 || problem.cols == 0) return cudaSuccess;
  const Masked masked{problem.dropout};
  return with_types(problem.wide_type, problem.factor_type, [&](auto types) {
    using Types = decltype(types);
    using Wide = typename Types::Wide;
    if (!problem.transposed) return launch_by_rank<Types, false>(problem, masked, stream);
    if (!on_top) return launch_by_rank<Types, true>(problem, masked, stream);
    if (problem.base) {
      const OnBase<Wide> base{
          view<Wide>(problem.base, problem.rows, problem.cols, problem.base_stride)};
      return launch_by_rank<Types, true>(problem, base, stream);
    }
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
