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
  using Mma = Multiplied<Wide, Factor>;
  static constexpr int rank_tile = rank_tile_, warps = 8, threads = 32 * warps;
  static constexpr int warp_rows = row_tile / warps, warp_ranks = 8;
  static constexpr int wide_parts = part_count<Wide, Factor>;
  static constexpr int factor_parts = part_count<Factor, Wide>;
  // Factors that have parts are cut once for the block; others are copied like the wide tile.
  static constexpr bool cut = factor_parts > 1;
  static constexpr int col_tile = !cut && rank_tile == 16 ? 64 : 32;
  static constexpr int col_groups = col_tile / 16;
  using WideTile = Tile<Wide, row_tile, col_tile, threads>;
  using FactorTile = Tile<Factor, col_tile, rank_tile, threads>;
  using HiddenTile = Tile<Factor, row_tile, rank_tile, threads>;
  using CutFactor = CutTile<col_tile, rank_tile, threads, factor_parts>;
  using CutHidden = CutTile<row_tile, rank_tile, threads, factor_parts>;
  using Rows = Operand<Wide, WideTile::pitch, false, wide_parts>;
  using Columns = Operand<Wide, WideTile::pitch, true, wide_parts>;
  using B = std::conditional_t<
      cut, CutOperand<__nv_bfloat16, CutFactor::pitch, true, factor_parts, CutFactor::plane>,
      Operand<Factor, FactorTile::pitch, true, factor_parts>>;
  static constexpr int stage_bytes = WideTile::bytes + (cut ? 0 : FactorTile::bytes);
  static constexpr int hidden_bytes = cut ? CutHidden::bytes : HiddenTile::bytes;
  static constexpr int resident_bytes = hidden_bytes + (cut ? 2 * CutFactor::bytes : 0);
  static constexpr int room = (largest_shared_bytes - resident_bytes) / stage_bytes;
  static constexpr int stages = room < 4 ? room : 4;
  static constexpr int shared_bytes = stages * stage_bytes + resident_bytes;
  static_assert(stages >= 2);
  static_assert(chunk_step % col_tile == 0);
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

// The block's rows of hidden, as the second operand of the column products: a warp's eight
// directions. They stay in registers unless they have parts.
template <typename P>
struct HiddenRows {
  using Number = std::conditional_t<P::cut, __nv_bfloat16, typename P::Factor>;
  static constexpr int pitch = P::HiddenTile::pitch;
  const Number* tile;  // from the warp's first direction on
  uint32_t held[P::cut ? 1 : row_tile / 16][2];

  __device__ void read(int k, uint32_t (&pair)[2]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    load_matrices<true>(pair, tile + (k + lane % 16) * pitch);
  }

  __device__ void hold() {
    if constexpr (!P::cut) {
#pragma unroll
      for (int k = 0; k < row_tile / 16; ++k) read(16 * k, held[k]);
    }
  }

  // Places 0 and 2 of each part's fragment for the rows k..k + 15.
  __device__ void load(int k, uint32_t (&fragments)[P::factor_parts][4]) const {
#pragma unroll
    for (int p = 0; p < P::factor_parts; ++p) {
      uint32_t pair[2];
      if constexpr (P::cut) {
        load_matrices<true>(pair, tile + p * P::CutHidden::plane +
                                      (k + static_cast<int>(threadIdx.x) % 16) * pitch);
      } else {
        pair[0] = held[k / 16][0];
        pair[1] = held[k / 16][1];
      }
      fragments[p][0] = fragments[p][1] = pair[0];
      fragments[p][2] = fragments[p][3] = pair[1];
    }
  }
};

// The slice's columns first_col.. get (this tile of dy)^T hidden.
template <typename P>
__device__ void multiply_columns(const typename P::Wide* dy, const HiddenRows<P>& hidden,
                                 int64_t first_col, int64_t cols, int first_rank, int64_t pitch,
                                 float* slice) {
  const int col = static_cast<int>(threadIdx.x) / 32 % P::col_groups * 16;
  constexpr int rows_at_once = 64;  // sums of so many rows at a time, independent of one another
  const typename P::Columns columns{dy + col};
  float sums[row_tile / rows_at_once][1][1][4] = {};
#pragma unroll
  for (int k = 0; k < row_tile; k += 16) {
    uint32_t of_dy[P::wide_parts][4], of_hidden[P::factor_parts][4];
    columns.load(0, k, of_dy);
    hidden.load(k, of_hidden);
    add_fragments<typename P::Mma>(sums[k / rows_at_once][0][0], of_dy, of_hidden, 0);
  }
#pragma unroll
  for (int i = 1; i < row_tile / rows_at_once; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[0][0][0][j] += sums[i][0][0][j];
  }
  store_sums(slice, sums[0], first_col + col, cols, first_rank, pitch);
}

template <typename Types, int rank_tile>
__global__ void __launch_bounds__(Plan<Types, rank_tile>::threads, 2)
    output_products(View<typename Types::Wide> dy, View<typename Types::Factor> B,
                    View<typename Types::Factor> hidden, int64_t chunk_cols, float* row_partial,
                    float* column_partial) {
  using P = Plan<Types, rank_tile>;
  using Number = typename HiddenRows<P>::Number;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * row_tile, rank = B.cols;
  const int64_t first = blockIdx.y * chunk_cols, pitch = (rank + 7) / 8 * 8;
  const int64_t cols = dy.cols - first < chunk_cols ? dy.cols - first : chunk_cols;
  const int count = static_cast<int>((cols + P::col_tile - 1) / P::col_tile);
  const int ranks = static_cast<int>(rank);
  auto* hidden_bytes = dynamic_shared<unsigned char>() + P::stages * P::stage_bytes;
  auto* hidden_tile = reinterpret_cast<Number*>(hidden_bytes);
  const auto col_of = [&](int tile) { return first + static_cast<int64_t>(tile) * P::col_tile; };
  const auto start = [&](int tile) {
    if (tile < count) {
      const Stage<P> stage(tile);
      P::WideTile::copy(stage.wide, {dy, row, col_of(tile)});
      if constexpr (!P::cut) P::FactorTile::copy(stage.factor, {B, col_of(tile), 0});
    }
    copy_async_commit();
  };
  const auto cut_tile = [&](int tile) {
    return reinterpret_cast<__nv_bfloat16*>(hidden_bytes + P::hidden_bytes +
                                            tile % 2 * P::CutFactor::bytes);
  };

  const int warp = static_cast<int>(threadIdx.x) / 32, warp_row = warp * P::warp_rows;
  const int first_rank = warp / P::col_groups * P::warp_ranks;
  const bool has_columns = first_rank < ranks;
  HiddenRows<P> hidden_rows{hidden_tile + (has_columns ? first_rank : 0), {}};
  float sums[P::warp_rows / 16][rank_tile / 8][4] = {};
  if constexpr (!P::cut) P::HiddenTile::copy(hidden_tile, {hidden, row, 0});
  for (int tile = 0; tile < P::stages - 1; ++tile) start(tile);
  if constexpr (P::cut) {
    typename P::CutFactor::Held held;
    P::CutFactor::load(held, {B, first, 0});
    P::CutFactor::store(cut_tile(0), held);
    typename P::CutHidden::Held rows;
    P::CutHidden::load(rows, {hidden, row, 0});
    P::CutHidden::store(hidden_tile, rows);
  }
  for (int tile = 0; tile < count; ++tile) {
    const Stage<P> stage(tile);
    copy_async_wait<P::stages - 2>();
    __syncthreads();
    if (tile == 0) hidden_rows.hold();
    start(tile + P::stages - 1);
    const typename P::Rows rows{stage.wide + warp_row * P::WideTile::pitch};
    float* slice = column_partial + blockIdx.x * dy.cols * pitch;
    if constexpr (P::cut) {
      typename P::CutFactor::Held held;
      if (tile + 1 < count) P::CutFactor::load(held, {B, col_of(tile + 1), 0});
      const typename P::B directions{cut_tile(tile)};
      add_product<typename P::Mma, P::col_tile>(rows, directions, ranks, sums);
      if (has_columns) {
        multiply_columns(stage.wide, hidden_rows, col_of(tile), dy.cols, first_rank, pitch, slice);
      }
      if (tile + 1 < count) P::CutFactor::store(cut_tile(tile + 1), held);
    } else {
      const typename P::B directions{stage.factor};
      add_product<typename P::Mma, P::col_tile>(rows, directions, ranks, sums);
      if (has_columns) {
        multiply_columns(stage.wide, hidden_rows, col_of(tile), dy.cols, first_rank, pitch, slice);
      }
    }
  }
  copy_async_wait<0>();
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
  if constexpr (std::is_same_v<typename Types::Wide, typename Types::Factor>) {
    if (problem.rank > 16)
      return launch_one<Types, 32>(problem, row_partial, column_partial, stream);
  }
  return launch_one<Types, 16>(problem, row_partial, column_partial, stream);
}

}  // namespace

bool output_products_fit(const OutputProducts& problem) {
  return problem.rank <= (problem.factor_type == problem.wide_type ? 32 : 16) &&
         problem.wide_type != Type::float32;
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
