// Both products with dy in one read of it: rows of dy times B, and columns of dy times hidden.
#include "fragments.h"
#include "skinny_products.h"

namespace rankwise::kernels {
namespace {

constexpr int row_tile = 256;   // fewer rows leave more slices of the column products
constexpr int chunk_step = 64;  // columns; a multiple of every plan's tile

// Rows of dy are divided among a block's warps for the one product; for the other its columns are,
// and the directions among the warps that are left.
template <typename Types, int rank_tile_>
struct Plan {
  using Wide = typename Types::Wide;
  using Factor = typename Types::Factor;
  static constexpr int rank_tile = rank_tile_, warps = 8, threads = 32 * warps;
  static constexpr int warp_rows = row_tile / warps;
  static constexpr int col_tile = rank_tile * sizeof(Factor) <= 32 ? 64 : 32;
  static constexpr int col_groups = col_tile / 16;
  static constexpr int even_ranks = rank_tile / (warps / col_groups);
  static constexpr int warp_ranks = even_ranks < 8 ? 8 : even_ranks;  // some warps may have none
  using Mma = Multiplied<Wide, Factor>;
  using WideTile = Tile<Wide, row_tile, col_tile, threads>;
  using FactorTile = Tile<Factor, col_tile, rank_tile, threads>;
  using HiddenTile = Tile<Factor, row_tile, rank_tile, threads>;
  static constexpr int wide_parts = part_count<Wide, Factor>;
  static constexpr int factor_parts = part_count<Factor, Wide>;
  using Rows = Operand<Wide, WideTile::pitch, false, wide_parts>;
  using Columns = Operand<Wide, WideTile::pitch, true, wide_parts>;
  using B = Operand<Factor, FactorTile::pitch, true, factor_parts>;
  using Hidden = Operand<Factor, HiddenTile::pitch, true, factor_parts>;
  static constexpr int stage_bytes = WideTile::bytes + FactorTile::bytes;
  static constexpr int stages = 3 * stage_bytes + HiddenTile::bytes <= largest_shared_bytes ? 3 : 2;
  static constexpr int shared_bytes = stages * stage_bytes + HiddenTile::bytes;
  static_assert(shared_bytes <= largest_shared_bytes);
  static_assert(chunk_step % col_tile == 0);
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

// The slice's columns first_col.. get (this tile of dy)^T hidden.
template <typename P>
__device__ void multiply_columns(const typename P::Wide* dy, const typename P::Factor* hidden,
                                 int64_t first_col, int64_t cols, int64_t rank, float* slice) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int col = warp % P::col_groups * 16, first_rank = warp / P::col_groups * P::warp_ranks;
  const int64_t pitch = (rank + 7) / 8 * 8;
  if (first_rank >= rank) return;
  constexpr int rows_at_once = 64;
  float sums[1][P::warp_ranks / 8][4] = {};
  const int ranks = static_cast<int>(rank) - first_rank;
  for (int row = 0; row < row_tile; row += rows_at_once) {
    const typename P::Columns columns{dy + row * P::WideTile::pitch + col};
    const typename P::Hidden directions{hidden + row * P::HiddenTile::pitch + first_rank};
    add_product<typename P::Mma>(columns, directions, rows_at_once, ranks, sums);
  }
  store_sums(slice, sums, first_col + col, cols, first_rank, pitch);
}

template <typename Types, int rank_tile>
__global__ void __launch_bounds__(Plan<Types, rank_tile>::threads,
                                  16 / Plan<Types, rank_tile>::warps)
    output_products(View<typename Types::Wide> dy, View<typename Types::Factor> B,
                    View<typename Types::Factor> hidden, int64_t chunk_cols, float* row_partial,
                    float* column_partial) {
  using P = Plan<Types, rank_tile>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * row_tile, rank = B.cols;
  const int64_t first = blockIdx.y * chunk_cols, pitch = (rank + 7) / 8 * 8;
  const int64_t cols = dy.cols - first < chunk_cols ? dy.cols - first : chunk_cols;
  const int64_t count = (cols + P::col_tile - 1) / P::col_tile;
  const int ranks = static_cast<int>(rank), used = (ranks + 15) / 16 * 16;
  auto* hidden_tile = reinterpret_cast<typename P::Factor*>(dynamic_shared<unsigned char>() +
                                                            P::stages * P::stage_bytes);
  const auto start = [&](int64_t tile) {
    if (tile < count) {
      const Stage<P> stage(tile);
      const int64_t col = first + tile * P::col_tile;
      P::WideTile::copy(stage.wide, {dy, row, col});
      P::FactorTile::copy(stage.factor, {B, col, 0}, P::col_tile, used);
    }
    copy_async_commit();
  };

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * P::warp_rows;
  float sums[P::warp_rows / 16][rank_tile / 8][4] = {};
  P::HiddenTile::copy(hidden_tile, {hidden, row, 0}, row_tile, used);
  for (int tile = 0; tile < P::stages - 1; ++tile) start(tile);
  for (int64_t tile = 0; tile < count; ++tile) {
    const Stage<P> stage(tile);
    copy_async_wait<P::stages - 2>();
    __syncthreads();
    start(tile + P::stages - 1);
    const typename P::Rows rows{stage.wide + warp_row * P::WideTile::pitch};
    const typename P::B directions{stage.factor};
    add_product<typename P::Mma>(rows, directions, P::col_tile, ranks, sums);
    multiply_columns<P>(stage.wide, hidden_tile, first + tile * P::col_tile, dy.cols, rank,
                        column_partial + blockIdx.x * dy.cols * pitch);
  }
  store_sums(row_partial + blockIdx.y * dy.rows * pitch, sums, row + warp_row, dy.rows, 0, pitch);
}

template <typename Types, int rank_tile>
int launch_one(const OutputProducts& problem, float* row_partial, float* column_partial,
               void* stream) {
  using P = Plan<Types, rank_tile>;
  const OutputChunks chunks = output_product_chunks(problem);
  const auto dy = view<typename P::Wide>(problem.dy, problem.rows, problem.cols, problem.dy_stride);
  const auto B = view<typename P::Factor>(problem.B, problem.cols, problem.rank, problem.B_stride);
  const auto hidden =
      view<typename P::Factor>(problem.hidden, problem.rows, problem.rank, problem.rank);
  const dim3 grid(static_cast<unsigned>(chunks.of_rows.count),
                  static_cast<unsigned>(chunks.of_columns.count));
  return launch(output_products<Types, rank_tile>, grid, P::threads, P::shared_bytes, stream, dy, B,
                hidden, chunks.of_columns.tiles * chunk_step, row_partial, column_partial);
}

template <typename Types>
int launch_by_rank(const OutputProducts& problem, float* row_partial, float* column_partial,
                   void* stream) {
  return problem.rank <= 16 ? launch_one<Types, 16>(problem, row_partial, column_partial, stream)
                            : launch_one<Types, 32>(problem, row_partial, column_partial, stream);
}

}  // namespace

bool output_products_fit(const OutputProducts& problem) {
  return problem.rank <= 32 && problem.wide_type != Type::float32;
}

OutputChunks output_product_chunks(const OutputProducts& problem) {
  const int64_t row_tiles = divide_up(problem.rows, row_tile);
  return {{1, row_tiles}, divide_sum(divide_up(problem.cols, chunk_step), row_tiles, 4)};
}

int launch_output_products(const OutputProducts& problem, float* row_partial, float* column_partial,
                           void* stream) {
  if (problem.rows == 0 || problem.cols == 0 || problem.rank == 0) return cudaSuccess;
  return with_types(problem.wide_type, problem.factor_type, [&](auto types) {
    using Types = decltype(types);
    if constexpr (std::is_same_v<typename Types::Wide, float>) {
      return static_cast<int>(cudaErrorInvalidValue);
    } else {
      return launch_by_rank<Types>(problem, row_partial, column_partial, stream);
    }
  });
}

}  // namespace rankwise::kernels
