// Row products: every row of a wide matrix times a factor, summed over a chunk of columns.
#include "fragments.h"
#include "skinny_products.h"

namespace rankwise::kernels {
namespace {

template <typename Types, int rank_tile_, bool by_column>
struct Plan {
  using Wide = typename Types::Wide;
  using Factor = typename Types::Factor;
  using Mma = Multiplied<Wide, Factor>;
  static constexpr int warps = 8, threads = 32 * warps;
  static constexpr int rank_tile = rank_tile_;
  static constexpr int row_tile = rank_tile == 16 ? 64 : 128;
  static constexpr int col_tile = (rank_tile == 16 ? 256 : 128) / static_cast<int>(sizeof(Wide));
  // Rows are divided among the warps, and what is left of them shares a tile's columns.
  static constexpr int row_warps = 4, depth_warps = warps / row_warps;
  static constexpr int warp_rows = row_tile / row_warps, warp_depth = col_tile / depth_warps;
  static constexpr int wide_parts = part_count<Wide, Factor>;
  static constexpr int factor_parts = part_count<Factor, Wide>;
  static constexpr int factor_rows = by_column ? col_tile : rank_tile;
  static constexpr int factor_cols = by_column ? rank_tile : col_tile;
  using WideTile = Tile<Wide, row_tile, col_tile, threads>;
  // Factors that have parts are cut once for the block; others are copied like the wide tile.
  static constexpr bool cut = factor_parts > 1;
  using FactorTile = Tile<Factor, factor_rows, factor_cols, threads>;
  using Cut = CutTile<factor_rows, factor_cols, threads, factor_parts>;
  using Rows = Operand<Wide, WideTile::pitch, false, wide_parts>;
  using Directions =
      std::conditional_t<cut,
                         CutOperand<__nv_bfloat16, Cut::pitch, by_column, factor_parts, Cut::plane>,
                         Operand<Factor, FactorTile::pitch, by_column, factor_parts>>;
  static constexpr int stage_bytes = WideTile::bytes + (cut ? 0 : FactorTile::bytes);
  static constexpr int stages = 3;
  // With room for two, the next tile's factor is cut while this one's is in use.
  static constexpr int cut_tiles = !cut ? 0 : rank_tile == 16 ? 2 : 1;
  static constexpr int shared_bytes = stages * stage_bytes + cut_tiles * Cut::bytes;
  static_assert(shared_bytes <= largest_shared_bytes);
  static_assert((depth_warps - 1) * row_tile * rank_tile * 4 <= stages * stage_bytes);
};

template <typename P>
struct Stage {
  typename P::Wide* wide;
  typename P::Factor* factor;

  __device__ explicit Stage(int tile) {
    auto* bytes = dynamic_shared<unsigned char>() + tile % P::stages * P::stage_bytes;
    wide = reinterpret_cast<typename P::Wide*>(bytes);
    factor = reinterpret_cast<typename P::Factor*>(bytes + P::WideTile::bytes);
  }
};

template <typename Types, int rank_tile, bool by_column>
__global__ void __launch_bounds__(Plan<Types, rank_tile, by_column>::threads, 2)
    row_products(View<typename Types::Wide> m, View<typename Types::Factor> factor, int64_t rank,
                 int64_t chunk_tiles, DropoutMask dropout, float* partial) {
  using P = Plan<Types, rank_tile, by_column>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * P::row_tile;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.z) * rank_tile;
  const int ranks = clamped(rank - first_rank, rank_tile);
  const int64_t first_col = blockIdx.y * chunk_tiles * P::col_tile;
  const int64_t all = (m.cols - first_col + P::col_tile - 1) / P::col_tile;
  const int count = static_cast<int>(all < chunk_tiles ? all : chunk_tiles);
  const uint64_t seed = dropout.threshold > 0 ? static_cast<uint64_t>(*dropout.seed) : 0;
  const uint32_t limit = dropout_limit(dropout.threshold);

  const auto factor_part = [&](int tile) -> Part<typename P::Factor> {
    const int64_t col = first_col + static_cast<int64_t>(tile) * P::col_tile;
    if (by_column) return {factor, col, first_rank};
    return {factor, first_rank, col};
  };
  const auto start = [&](int tile) {
    if (tile < count) {
      const Stage<P> stage(tile);
      P::WideTile::copy(stage.wide, {m, row, first_col + static_cast<int64_t>(tile) * P::col_tile});
      if constexpr (!P::cut) P::FactorTile::copy(stage.factor, factor_part(tile));
    }
    copy_async_commit();
  };
  const auto cut_tile = [&](int tile) {
    return reinterpret_cast<__nv_bfloat16*>(dynamic_shared<unsigned char>() +
                                            P::stages * P::stage_bytes) +
           (P::cut_tiles == 2 ? tile % 2 : 0) * P::Cut::plane * P::factor_parts;
  };

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp % P::row_warps * P::warp_rows;
  const int depth = warp / P::row_warps * P::warp_depth;
  float sums[P::warp_rows / 16][rank_tile / 8][4] = {};
  for (int tile = 0; tile < P::stages - 1; ++tile) start(tile);
  if constexpr (P::cut) {
    typename P::Cut::Held held;
    P::Cut::load(held, factor_part(0));
    P::Cut::store(cut_tile(0), held);
  }
  for (int tile = 0; tile < count; ++tile) {
    const Stage<P> stage(tile);
    copy_async_wait<P::stages - 2>();
    if (dropout.threshold > 0) {
      const int64_t col = first_col + static_cast<int64_t>(tile) * P::col_tile;
      P::WideTile::drop(stage.wide, {m, row, col}, seed, limit);
    }
    __syncthreads();
    start(tile + P::stages - 1);
    const typename P::Rows rows{stage.wide + warp_row * P::WideTile::pitch + depth};
    if constexpr (P::cut) {
      typename P::Cut::Held held;
      if (tile + 1 < count) P::Cut::load(held, factor_part(tile + 1));
      const typename P::Directions directions{cut_tile(tile) +
                                              depth * (by_column ? P::Cut::pitch : 1)};
      add_product<typename P::Mma, P::warp_depth>(rows, directions, ranks, sums);
      if (P::cut_tiles == 1) __syncthreads();
      if (tile + 1 < count) P::Cut::store(cut_tile(tile + 1), held);
    } else {
      const typename P::Directions directions{stage.factor +
                                              depth * (by_column ? P::FactorTile::pitch : 1)};
      add_product<typename P::Mma, P::warp_depth>(rows, directions, ranks, sums);
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  gather_sums<P::row_warps, P::depth_warps - 1>(dynamic_shared<float>(), sums);
  if (warp >= P::row_warps) return;
  const int64_t pitch = (rank + 7) / 8 * 8;
  store_sums(partial + blockIdx.y * m.rows * pitch, sums, row + warp_row, m.rows, first_rank,
             pitch);
}

constexpr int64_t rank_tile_of(const RowProducts& problem) {
  return problem.rank <= 16 ? 16 : 64;
}

template <typename Types, int rank_tile, bool by_column>
int launch_one(const RowProducts& problem, float* partial, void* stream) {
  using P = Plan<Types, rank_tile, by_column>;
  const Chunks chunks = row_product_chunks(problem);
  const auto m = view<typename P::Wide>(problem.m, problem.rows, problem.cols, problem.m_stride);
  const auto factor =
      view<typename P::Factor>(problem.factor, by_column ? problem.cols : problem.rank,
                               by_column ? problem.rank : problem.cols, problem.factor_stride);
  const dim3 grid(static_cast<unsigned>(divide_up(problem.rows, P::row_tile)),
                  static_cast<unsigned>(chunks.count),
                  static_cast<unsigned>(divide_up(problem.rank, rank_tile)));
  return launch(row_products<Types, rank_tile, by_column>, grid, P::threads, P::shared_bytes,
                stream, m, factor, problem.rank, chunks.tiles, problem.dropout, partial);
}

template <typename Types, int rank_tile>
int launch_by_layout(const RowProducts& problem, float* partial, void* stream) {
  return problem.factor_by_column ? launch_one<Types, rank_tile, true>(problem, partial, stream)
                                  : launch_one<Types, rank_tile, false>(problem, partial, stream);
}

}  // namespace

Chunks row_product_chunks(const RowProducts& problem) {
  const bool few = rank_tile_of(problem) == 16;
  const int64_t col_tile = (few ? 256 : 128) / (problem.wide_type == Type::float32 ? 4 : 2);
  const int64_t blocks =
      divide_up(problem.rows, few ? 64 : 128) * divide_up(problem.rank, rank_tile_of(problem));
  return divide_sum(divide_up(problem.cols, col_tile), blocks, 4);
}

int launch_row_products(const RowProducts& problem, float* partial, void* stream) {
  if (problem.rows == 0 || problem.cols == 0 || problem.rank == 0) return cudaSuccess;
  return with_types(problem.wide_type, problem.factor_type, [&](auto types) {
    using Types = decltype(types);
    return rank_tile_of(problem) == 16 ? launch_by_layout<Types, 16>(problem, partial, stream)
                                       : launch_by_layout<Types, 64>(problem, partial, stream);
  });
}

}  // namespace rankwise::kernels
