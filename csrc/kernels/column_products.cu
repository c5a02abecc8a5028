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
  using Mma = Multiplied<Wide, Factor>;
  static constexpr int warps = 8, threads = 32 * warps;
  static constexpr int rank_tile = rank_tile_, row_tile = 64;
  static constexpr int col_tile = 256 / static_cast<int>(sizeof(Wide));
  // Columns are divided among the warps, and what is left of them shares a tile's rows.
  static constexpr int col_warps = 4, depth_warps = warps / col_warps;
  static constexpr int warp_cols = col_tile / col_warps, warp_depth = row_tile / depth_warps;
  static constexpr int wide_parts = part_count<Wide, Factor>;
  static constexpr int skinny_parts = part_count<Factor, Wide>;
  using WideTile = Tile<Wide, row_tile, col_tile, threads>;
  // Skinny tiles that have parts are cut once for the block; others are copied like the wide one.
  static constexpr bool cut = skinny_parts > 1;
  using SkinnyTile = Tile<Factor, row_tile, rank_tile, threads>;
  using Cut = CutTile<row_tile, rank_tile, threads, skinny_parts>;
  using Columns = Operand<Wide, WideTile::pitch, true, wide_parts>;
  using Directions =
      std::conditional_t<cut, CutOperand<__nv_bfloat16, Cut::pitch, true, skinny_parts, Cut::plane>,
                         Operand<Factor, SkinnyTile::pitch, true, skinny_parts>>;
  static constexpr int stage_bytes = WideTile::bytes + (cut ? 0 : SkinnyTile::bytes);
  static constexpr int stages = 3;
  // With room for two, the next tile's parts are made while this one's are in use.
  static constexpr int cut_tiles = !cut ? 0 : rank_tile == 16 ? 2 : 1;
  static constexpr int shared_bytes = stages * stage_bytes + cut_tiles * Cut::bytes;
  static_assert(shared_bytes <= largest_shared_bytes);
  static_assert((depth_warps - 1) * col_tile * rank_tile * 4 <= stages * stage_bytes);
};

template <typename P>
struct Stage {
  typename P::Wide* wide;
  typename P::Factor* skinny;

  __device__ explicit Stage(int tile) {
    auto* bytes = dynamic_shared<unsigned char>() + tile % P::stages * P::stage_bytes;
    wide = reinterpret_cast<typename P::Wide*>(bytes);
    skinny = reinterpret_cast<typename P::Factor*>(bytes + P::WideTile::bytes);
  }
};

template <typename Types, int rank_tile>
__global__ void __launch_bounds__(Plan<Types, rank_tile>::threads, 2)
    column_products(View<typename Types::Wide> m, View<typename Types::Factor> skinny,
                    int64_t chunk_tiles, DropoutMask dropout, float* partial) {
  using P = Plan<Types, rank_tile>;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * P::col_tile, rank = skinny.cols;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.z) * rank_tile;
  const int ranks = clamped(rank - first_rank, rank_tile);
  const int64_t first_row = blockIdx.y * chunk_tiles * P::row_tile;
  const int64_t all = (m.rows - first_row + P::row_tile - 1) / P::row_tile;
  const int count = static_cast<int>(all < chunk_tiles ? all : chunk_tiles);
  const uint64_t seed = dropout.threshold > 0 ? static_cast<uint64_t>(*dropout.seed) : 0;
  const uint32_t limit = dropout_limit(dropout.threshold);

  const auto row_of = [&](int tile) {
    return first_row + static_cast<int64_t>(tile) * P::row_tile;
  };
  const auto start = [&](int tile) {
    if (tile < count) {
      const Stage<P> stage(tile);
      P::WideTile::copy(stage.wide, {m, row_of(tile), col});
      if constexpr (!P::cut) P::SkinnyTile::copy(stage.skinny, {skinny, row_of(tile), first_rank});
    }
    copy_async_commit();
  };
  const auto cut_tile = [&](int tile) {
    return reinterpret_cast<__nv_bfloat16*>(dynamic_shared<unsigned char>() +
                                            P::stages * P::stage_bytes) +
           (P::cut_tiles == 2 ? tile % 2 : 0) * P::Cut::plane * P::skinny_parts;
  };

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_col = warp % P::col_warps * P::warp_cols;
  const int depth = warp / P::col_warps * P::warp_depth;
  float sums[P::warp_cols / 16][rank_tile / 8][4] = {};
  for (int tile = 0; tile < P::stages - 1; ++tile) start(tile);
  if constexpr (P::cut) {
    typename P::Cut::Held held;
    P::Cut::load(held, {skinny, row_of(0), first_rank});
    P::Cut::store(cut_tile(0), held);
  }
  for (int tile = 0; tile < count; ++tile) {
    const Stage<P> stage(tile);
    copy_async_wait<P::stages - 2>();
    if (dropout.threshold > 0) {
      P::WideTile::drop(stage.wide, {m, row_of(tile), col}, seed, limit);
    }
    __syncthreads();
    start(tile + P::stages - 1);
    const typename P::Columns columns{stage.wide + depth * P::WideTile::pitch + warp_col};
    if constexpr (P::cut) {
      typename P::Cut::Held held;
      if (tile + 1 < count) P::Cut::load(held, {skinny, row_of(tile + 1), first_rank});
      const typename P::Directions directions{cut_tile(tile) + depth * P::Cut::pitch};
      add_product<typename P::Mma, P::warp_depth>(columns, directions, ranks, sums);
      if (P::cut_tiles == 1) __syncthreads();
      if (tile + 1 < count) P::Cut::store(cut_tile(tile + 1), held);
    } else {
      const typename P::Directions directions{stage.skinny + depth * P::SkinnyTile::pitch};
      add_product<typename P::Mma, P::warp_depth>(columns, directions, ranks, sums);
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  gather_sums<P::col_warps, P::depth_warps - 1>(dynamic_shared<float>(), sums);
  if (warp >= P::col_warps) return;
  const int64_t pitch = (rank + 7) / 8 * 8;
  store_sums(partial + blockIdx.y * m.cols * pitch, sums, col + warp_col, m.cols, first_rank,
             pitch);
}

constexpr int64_t rank_tile_of(const ColumnProducts& problem) {
  return problem.rank <= 16 ? 16 : 64;
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
  return launch(column_products<Types, rank_tile>, grid, P::threads, P::shared_bytes, stream, m,
                skinny, chunks.tiles, problem.dropout, partial);
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
    return rank_tile_of(problem) == 16 ? launch_one<Types, 16>(problem, partial, stream)
                                       : launch_one<Types, 64>(problem, partial, stream);
  });
}

}  // namespace rankwise::kernels
