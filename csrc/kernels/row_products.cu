// Row products: every row of a wide matrix times a factor, summed over a chunk of columns.
#include "fragments.h"
#include "skinny_products.h"

namespace rankwise::kernels {
namespace {

template <typename Types, int rank_tile_, bool by_column>
struct Plan {
  using Wide = typename Types::Wide;
  using Factor = typename Types::Factor;
  static constexpr int threads = 128, stages = 3;
  static constexpr int rank_tile = rank_tile_, row_tile = 128;
  static constexpr int col_tile = 128 / static_cast<int>(sizeof(Wide));
  static constexpr int warp_rows = row_tile / (threads / 32);
  using Mma = Multiplied<Wide, Factor>;
  using WideTile = Tile<Wide, row_tile, col_tile, threads>;
  using FactorTile = std::conditional_t<by_column, Tile<Factor, col_tile, rank_tile, threads>,
                                        Tile<Factor, rank_tile, col_tile, threads>>;
  using Rows = Operand<Wide, WideTile::pitch, false, part_count<Wide, Factor>>;
  using Directions = Operand<Factor, FactorTile::pitch, by_column, part_count<Factor, Wide>>;
  static constexpr int stage_bytes = WideTile::bytes + FactorTile::bytes;
  static_assert(stages * stage_bytes <= largest_shared_bytes);
};

template <typename P>
struct Stage {
  typename P::Wide* wide;
  typename P::Factor* factor;

  __device__ explicit Stage(int64_t tile) {
    auto* bytes = dynamic_shared<unsigned char>() + tile % P::stages * P::stage_bytes;
    wide = reinterpret_cast<typename P::Wide*>(bytes);
    factor = reinterpret_cast<typename P::Factor*>(bytes + P::WideTile::bytes);
  }
};

template <typename Types, int rank_tile, bool by_column>
__global__ void __launch_bounds__(128, 3)
    row_products(View<typename Types::Wide> m, View<typename Types::Factor> factor, int64_t rank,
                 int64_t chunk_tiles, DropoutMask dropout, float* partial) {
  using P = Plan<Types, rank_tile, by_column>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * P::row_tile;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.z) * rank_tile;
  const int ranks = static_cast<int>(rank - first_rank < rank_tile ? rank - first_rank : rank_tile);
  const int64_t first = blockIdx.y * chunk_tiles;
  const int64_t all = (m.cols + P::col_tile - 1) / P::col_tile;
  const int64_t count = all - first < chunk_tiles ? all - first : chunk_tiles;
  const uint64_t seed = dropout.threshold > 0 ? static_cast<uint64_t>(*dropout.seed) : 0;

  const auto start = [&](int64_t tile) {
    if (tile < count) {
      const Stage<P> stage(tile);
      const int64_t col = (first + tile) * P::col_tile;
      P::WideTile::copy(stage.wide, {m, row, col});
      const int used = (ranks + 15) / 16 * 16;
      if (by_column) {
        P::FactorTile::copy(stage.factor, {factor, col, first_rank}, P::col_tile, used);
      } else {
        P::FactorTile::copy(stage.factor, {factor, first_rank, col}, used, P::col_tile);
      }
    }
    copy_async_commit();
  };

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * P::warp_rows;
  float sums[P::warp_rows / 16][rank_tile / 8][4] = {};
  for (int tile = 0; tile < P::stages - 1; ++tile) start(tile);
  for (int64_t tile = 0; tile < count; ++tile) {
    const Stage<P> stage(tile);
    copy_async_wait<P::stages - 2>();
    if (dropout.threshold > 0) {
      const int64_t col = (first + tile) * P::col_tile;
      P::WideTile::drop(stage.wide, {m, row, col}, seed, dropout.threshold);
    }
    __syncthreads();
    start(tile + P::stages - 1);
    const typename P::Rows rows{stage.wide + warp_row * P::WideTile::pitch};
    const typename P::Directions directions{stage.factor};
    add_product<typename P::Mma>(rows, directions, P::col_tile, ranks, sums);
  }
  const int64_t pitch = (rank + 7) / 8 * 8;
  store_sums(partial + blockIdx.y * m.rows * pitch, sums, row + warp_row, m.rows, first_rank,
             pitch);
}

constexpr int64_t rank_tile_of(const RowProducts& problem) {
  return problem.rank <= 16 ? 16 : problem.factor_type == Type::float32 ? 32 : 64;
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
  return launch(row_products<Types, rank_tile, by_column>, grid, P::threads,
                P::stages * P::stage_bytes, stream, m, factor, problem.rank, chunks.tiles,
                problem.dropout, partial);
}

template <typename Types, int rank_tile>
int launch_by_layout(const RowProducts& problem, float* partial, void* stream) {
  return problem.factor_by_column ? launch_one<Types, rank_tile, true>(problem, partial, stream)
                                  : launch_one<Types, rank_tile, false>(problem, partial, stream);
}

}  // namespace

Chunks row_product_chunks(const RowProducts& problem) {
  const int64_t col_tile = problem.wide_type == Type::float32 ? 32 : 64;
  const int64_t blocks =
      divide_up(problem.rows, 128) * divide_up(problem.rank, rank_tile_of(problem));
  return divide_sum(divide_up(problem.cols, col_tile), blocks, 4);
}

int launch_row_products(const RowProducts& problem, float* partial, void* stream) {
  if (problem.rows == 0 || problem.cols == 0 || problem.rank == 0) return cudaSuccess;
  return with_types(problem.wide_type, problem.factor_type, [&](auto types) {
    using Types = decltype(types);
    constexpr int wide_rank = std::is_same_v<typename Types::Factor, float> ? 32 : 64;
    return rank_tile_of(problem) == 16
               ? launch_by_layout<Types, 16>(problem, partial, stream)
               : launch_by_layout<Types, wide_rank>(problem, partial, stream);
  });
}

}  // namespace rankwise::kernels
