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
  static constexpr int wide_parts = part_count<Wide, Factor>;
  static constexpr int factor_parts = part_count<Factor, Wide>;
  using Mma = Multiplied<Wide, Factor>;
  using WideTile = Tile<Wide, row_tile, col_tile, threads>;
  using FactorTile = std::conditional_t<by_column, Tile<Factor, col_tile, rank_tile, threads>,
                                        Tile<Factor, rank_tile, col_tile, threads>>;
  static constexpr int stage_bytes = WideTile::bytes + FactorTile::bytes;
};

// A thread's sums: rows in groups of 16, ranks in groups of 8, and mma's four places.
template <typename P>
using Sums = float[P::warp_rows / 16][P::rank_tile / 8][4];

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

template <typename P, bool by_column>
__device__ void multiply_tile(const Stage<P>& stage, int ranks,
                              float (*sums)[P::rank_tile / 8][4]) {
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * P::warp_rows;
#pragma unroll
  for (int k = 0; k < P::col_tile; k += 16) {
    uint32_t a[P::warp_rows / 16][P::wide_parts][4];
#pragma unroll
    for (int i = 0; i < P::warp_rows / 16; ++i) {
      load_fragment<false, P::WideTile::pitch>(
          stage.wide + (warp_row + 16 * i) * P::WideTile::pitch + k, a[i]);
    }
#pragma unroll
    for (int n = 0; n < P::rank_tile; n += 16) {
      if (n >= ranks) continue;
      uint32_t b[P::factor_parts][4];
      constexpr int pitch = P::FactorTile::pitch;
      load_fragment<by_column, pitch>(stage.factor + (by_column ? k * pitch + n : n * pitch + k),
                                      b);
#pragma unroll
      for (int i = 0; i < P::warp_rows / 16; ++i) {
        auto& pair = reinterpret_cast<float(&)[2][4]>(sums[i][n / 8]);
        multiply_add_parts<typename P::Mma>(pair, a[i], b, n + 8 < ranks);
      }
    }
  }
}

template <typename P>
__device__ void store(float* partial, const float (*sums)[P::rank_tile / 8][4], int64_t rows,
                      int64_t first_rank, int64_t pitch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * P::row_tile + threadIdx.x / 32 * P::warp_rows;
#pragma unroll
  for (int i = 0; i < P::warp_rows / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + 16 * i + 8 * half + lane / 4;
      if (row >= rows) continue;
      float* to = partial + (blockIdx.y * rows + row) * pitch + first_rank + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < P::rank_tile / 8; ++n) {
        if (first_rank + 8 * n >= pitch) continue;
        *reinterpret_cast<float2*>(to + 8 * n) =
            make_float2(sums[i][n][2 * half], sums[i][n][2 * half + 1]);
      }
    }
  }
}

template <typename Types, int rank_tile, bool by_column>
__global__ void __launch_bounds__(128)
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

  Sums<P> sums = {};
  for (int tile = 0; tile < P::stages - 1; ++tile) start(tile);
  for (int64_t tile = 0; tile < count; ++tile) {
    const Stage<P> stage(tile);
    copy_async_wait<P::stages - 2>();
    if (dropout.threshold > 0) {
      P::WideTile::drop(stage.wide, {m, row, (first + tile) * P::col_tile}, seed,
                        dropout.threshold);
    }
    __syncthreads();
    start(tile + P::stages - 1);
    if constexpr (P::factor_parts == 1) {
      multiply_tile<P, by_column>(stage, ranks, sums);
    } else {  // the tensor core's long sums would lose more than float32's
      Sums<P> tile_sums = {};
      multiply_tile<P, by_column>(stage, ranks, tile_sums);
#pragma unroll
      for (int i = 0; i < P::warp_rows / 16 * rank_tile / 2; ++i) {
        (&sums[0][0][0])[i] += (&tile_sums[0][0][0])[i];
      }
    }
  }
  store<P>(partial, sums, m.rows, first_rank, (rank + 7) / 8 * 8);
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
