// Column products: every column of a wide matrix times a skinny matrix, summed over a chunk of
// rows.
#include "fragments.h"
#include "skinny_products.h"

namespace rankwise::kernels {
namespace {

template <typename Types, int rank_tile_>
struct Plan {
  using Wide = typename Types::Wide;
  using Factor = typename Types::Factor;
  static constexpr int threads = 128, stages = 3;
  static constexpr int rank_tile = rank_tile_, row_tile = 64;
  static constexpr int col_tile = 256 / static_cast<int>(sizeof(Wide));
  static constexpr int warp_cols = col_tile / (threads / 32);
  using Mma = Multiplied<Wide, Factor>;
  using WideTile = Tile<Wide, row_tile, col_tile, threads>;
  using SkinnyTile = Tile<Factor, row_tile, rank_tile, threads>;
  using Columns = Operand<Wide, WideTile::pitch, true, part_count<Wide, Factor>>;
  using Directions = Operand<Factor, SkinnyTile::pitch, true, part_count<Factor, Wide>>;
  static constexpr int stage_bytes = WideTile::bytes + SkinnyTile::bytes;
  static_assert(stages * stage_bytes <= largest_shared_bytes);
};

template <typename P>
struct Stage {
  typename P::Wide* wide;
  typename P::Factor* skinny;

  __device__ explicit Stage(int64_t tile) {
    auto* bytes = dynamic_shared<unsigned char>() + tile % P::stages * P::stage_bytes;
    wide = reinterpret_cast<typename P::Wide*>(bytes);
    skinny = reinterpret_cast<typename P::Factor*>(bytes + P::WideTile::bytes);
  }
};

template <typename Types, int rank_tile>
__global__ void __launch_bounds__(128, 3)
    column_products(View<typename Types::Wide> m, View<typename Types::Factor> skinny,
                    int64_t chunk_tiles, DropoutMask dropout, float* partial) {
  using P = Plan<Types, rank_tile>;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * P::col_tile, rank = skinny.cols;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.z) * rank_tile;
  const int ranks = static_cast<int>(rank - first_rank < rank_tile ? rank - first_rank : rank_tile);
  const int64_t first = blockIdx.y * chunk_tiles;
  const int64_t all = (m.rows + P::row_tile - 1) / P::row_tile;
  const int64_t count = all - first < chunk_tiles ? all - first : chunk_tiles;
  const uint64_t seed = dropout.threshold > 0 ? static_cast<uint64_t>(*dropout.seed) : 0;

  const auto start = [&](int64_t tile) {
    if (tile < count) {
      const Stage<P> stage(tile);
      const int64_t row = (first + tile) * P::row_tile;
      P::WideTile::copy(stage.wide, {m, row, col});
      P::SkinnyTile::copy(stage.skinny, {skinny, row, first_rank}, P::row_tile,
                          (ranks + 15) / 16 * 16);
    }
    copy_async_commit();
  };

  const int warp_col = static_cast<int>(threadIdx.x) / 32 * P::warp_cols;
  float sums[P::warp_cols / 16][rank_tile / 8][4] = {};
  for (int tile = 0; tile < P::stages - 1; ++tile) start(tile);
  for (int64_t tile = 0; tile < count; ++tile) {
    const Stage<P> stage(tile);
    copy_async_wait<P::stages - 2>();
    if (dropout.threshold > 0) {
      const int64_t row = (first + tile) * P::row_tile;
      P::WideTile::drop(stage.wide, {m, row, col}, seed, dropout.threshold);
    }
    __syncthreads();
    start(tile + P::stages - 1);
    const typename P::Columns columns{stage.wide + warp_col};
    const typename P::Directions directions{stage.skinny};
    add_product<typename P::Mma>(columns, directions, P::row_tile, ranks, sums);
  }
  const int64_t pitch = (rank + 7) / 8 * 8;
  store_sums(partial + blockIdx.y * m.cols * pitch, sums, col + warp_col, m.cols, first_rank,
             pitch);
}

constexpr int64_t rank_tile_of(const ColumnProducts& problem) {
  return problem.rank <= 16 ? 16 : problem.factor_type == Type::float32 ? 32 : 64;
}

template <typename Types, int rank_tile>
int launch_one(const ColumnProducts& problem, float* partial, void* stream) {
  using P = Plan<Types, rank_tile>;
  const Chunks chunks = column_product_chunks(problem);
  const auto m = view<typename P::Wide>(problem.m, problem.rows, problem.cols, problem.m_stride);
  const auto skinny =
      view<typename P::Factor>(problem.skinny, problem.rows, problem.rank, problem.rank);
  const dim3 grid(static_cast<unsigned>(divide_up(problem.cols, P::col_tile)),
                  static_cast<unsigned>(chunks.count),
                  static_cast<unsigned>(divide_up(problem.rank, rank_tile)));
  return launch(column_products<Types, rank_tile>, grid, P::threads, P::stages * P::stage_bytes,
                stream, m, skinny, chunks.tiles, problem.dropout, partial);
}

}  // namespace

Chunks column_product_chunks(const ColumnProducts& problem) {
  const int64_t col_tile = problem.wide_type == Type::float32 ? 64 : 128;
  const int64_t blocks =
      divide_up(problem.cols, col_tile) * divide_up(problem.rank, rank_tile_of(problem));
  return divide_sum(divide_up(problem.rows, 64), blocks, 4);
}

int launch_column_products(const ColumnProducts& problem, float* partial, void* stream) {
  if (problem.rows == 0 || problem.cols == 0 || problem.rank == 0) return cudaSuccess;
  return with_types(problem.wide_type, problem.factor_type, [&](auto types) {
    using Types = decltype(types);
    constexpr int wide_rank = std::is_same_v<typename Types::Factor, float> ? 32 : 64;
    return rank_tile_of(problem) == 16 ? launch_one<Types, 16>(problem, partial, stream)
                                       : launch_one<Types, wide_rank>(problem, partial, stream);
  });
}

}  // namespace rankwise::kernels
