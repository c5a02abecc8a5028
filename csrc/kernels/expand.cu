// out = scale * mask(H F) for H [rows, rank] and F [rank, cols]: what is written is touched once.
#include "fragments.h"
#include "skinny_products.h"

namespace rankwise::kernels {
namespace {

// How many parts a float32 factor needs for results of type Wide: 16 bits of each number are plenty
// where the result is rounded to 11.
template <typename Wide, typename Factor>
constexpr int parts_for = std::is_same_v<Wide, Factor> && sizeof(Wide) == 2 ? 1
                          : sizeof(Wide) == 2                               ? 2
                                                                            : 3;

template <typename Types, bool by_column>
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
  static constexpr int shared_bytes =
      operand_bytes > OutTile::bytes ? operand_bytes : OutTile::bytes;
  static_assert(shared_bytes <= largest_shared_bytes);
};

// The first row and column of the thread's warp.
template <typename P>
__device__ int2 warp_place() {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  return {warp / 2 * P::warp_rows, warp % 2 * P::warp_cols};
}

// The sums, scaled and rounded, as a tile of the result in shared memory.
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
        pair[0] = Wide(scale * sums[i][n][2 * half]);
        pair[1] = Wide(scale * sums[i][n][2 * half + 1]);
      }
    }
  }
}

template <typename P>
__device__ void write_tile(typename P::Wide* tile, const Part<typename P::Wide>& part,
                           typename P::Wide* out, const DropoutMask& dropout) {
  using OutTile = typename P::OutTile;
  const uint64_t seed = dropout.threshold > 0 ? static_cast<uint64_t>(*dropout.seed) : 0;
  if (dropout.threshold > 0) OutTile::drop(tile, part, seed, dropout.threshold);
  OutTile::for_pieces(P::row_tile, P::col_tile,
                      [&](int row, int col) { OutTile::write(tile, part, row, col, out); });
}

template <typename Types, bool by_column>
__global__ void __launch_bounds__(128, 3)
    expand(View<typename Types::Factor> hidden, View<typename Types::Factor> factor, float scale,
           DropoutMask dropout, View<typename Types::Wide> shape, typename Types::Wide* out) {
  using P = Plan<Types, by_column>;
  auto* hidden_tile = dynamic_shared<typename P::Factor>();
  auto* factor_tile = hidden_tile + P::HiddenTile::bytes / sizeof(typename P::Factor);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * P::row_tile;
  const int64_t col = static_cast<int64_t>(blockIdx.y) * P::col_tile;
  const int64_t rank = hidden.cols;

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
  __syncthreads();
  auto* tile = dynamic_shared<typename P::Wide>();
  round_into<P>(tile, sums, scale);
  __syncthreads();
  write_tile<P>(tile, {shape, row, col}, out, dropout);
}

template <typename Types, bool by_column>
int launch_one(const Expand& problem, void* stream) {
  using P = Plan<Types, by_column>;
  const auto hidden =
      view<typename P::Factor>(problem.hidden, problem.rows, problem.rank, problem.rank);
  const auto factor =
      view<typename P::Factor>(problem.factor, by_column ? problem.cols : problem.rank,
                               by_column ? problem.rank : problem.cols, problem.factor_stride);
  const auto shape =
      view<typename P::Wide>(problem.out, problem.rows, problem.cols, problem.out_stride);
  const dim3 grid(static_cast<unsigned>(divide_up(problem.rows, P::row_tile)),
                  static_cast<unsigned>(divide_up(problem.cols, P::col_tile)));
  return launch(expand<Types, by_column>, grid, P::threads, P::shared_bytes, stream, hidden, factor,
                problem.scale, problem.dropout, shape, static_cast<typename P::Wide*>(problem.out));
}

}  // namespace

int launch_expand(const Expand& problem, void* stream) {
  if (problem.rows == 0 || problem.cols == 0) return cudaSuccess;
  return with_types(problem.wide_type, problem.factor_type, [&](auto types) {
    using Types = decltype(types);
    return problem.transposed ? launch_one<Types, true>(problem, stream)
                              : launch_one<Types, false>(problem, stream);
  });
}

}  // namespace rankwise::kernels
