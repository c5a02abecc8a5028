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
  static constexpr int wide_parts = part_count<Wide, Factor>;
  static constexpr int factor_parts = part_count<Factor, Wide>;
  using Mma = Multiplied<Wide, Factor>;
  using WideTile = Tile<Wide, row_tile, col_tile, threads>;
  using SkinnyTile = Tile<Factor, row_tile, rank_tile, threads>;
  static constexpr int stage_bytes = WideTile::bytes + SkinnyTile::bytes;
};

// A thread's sums: columns in groups of 16, ranks in groups of 8, and mma's four places.
template <typename P>
using Sums = float[P::warp_cols / 16][P::rank_tile / 8][4];

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

template <typename P>
__device__ void multiply_tile(const Stage<P>& stage, int ranks,
                              float (*sums)[P::rank_tile / 8][4]) {
  const int warp_col = static_cast<int>(threadIdx.x) / 32 * P::warp_cols;
#pragma unroll
  for (int k = 0; k < P::row_tile; k += 16) {
    uint32_t a[P::warp_cols / 16][P::wide_parts][4];
#pragma unroll
    for (int i = 0; i < P::warp_cols / 16; ++i) {
      load_fragment<true, P::WideTile::pitch>(
          stage.wide + k * P::WideTile::pitch + warp_col + 16 * i, a[i]);
    }
#pragma unroll
    for (int n = 0; n < P::rank_tile; n += 16) {
      if (n >= ranks) continue;
      uint32_t b[P::factor_parts][4];
      constexpr int pitch = P::SkinnyTile::pitch;
      load_fragment<true, pitch>(stage.skinny + k * pitch + n, b);
#pragma unroll
      for (int i = 0; i < P::warp_cols / 16; ++i) {
        auto& pair = reinterpret_cast<float(&)[2][4]>(sums[i][n / 8]);
        multiply_add_parts<typename P::Mma>(pair, a[i], b, n + 8 < ranks);
      }
    }
  }
}

template <typename P>
__device__ void store(float* partial, const float (*sums)[P::rank_tile / 8][4], int64_t cols,
                      int64_t first_rank, int64_t pitch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * P::col_tile + threadIdx.x / 32 * P::warp_cols;
#pragma unroll
  for (int i = 0; i < P::warp_cols / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t col = first + 16 * i + 8 * half + lane / 4;
      if (col >= cols) continue;
      float* to = partial + (blockIdx.y * cols + col) * pitch + first_rank + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < P::rank_tile / 8; ++n) {
        if (first_rank + 8 * n >= pitch) continue;
        *reinterpret_cast<float2*>(to + 8 * n) =
            make_float2(sums[i][n][2 * half], sums[i][n][2 * half + 1]);
      }
    }
  }
}

template <typename Types, int rank_tile>
__global__ void __launch_bounds__(128)
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

  Sums<P> sums = {};
  for (int tile = 0; tile < P::stages - 1; ++tile) start(tile);
  for (int64_t tile = 0; tile < count; ++tile) {
    const Stage<P> stage(tile);
    copy_async_wait<P::stages - 2>();
    if (dropout.threshold > 0) {
      P::WideTile::drop(stage.wide, {m, (first + tile) * P::row_tile, col}, seed,
                        dropout.threshold);
    }
    __syncthreads();
    start(tile + P::stages - 1);
    if constexpr (P::factor_parts == 1) {
      multiply_tile<P>(stage, ranks, sums);
    } else {  // the tensor core's long sums would lose more than float32's
      Sums<P> tile_sums = {};
      multiply_tile<P>(stage, ranks, tile_sums);
#pragma unroll
      for (int i = 0; i < P::warp_cols / 16 * rank_tile / 2; ++i) {
        (&sums[0][0][0])[i] += (&tile_sums[0][0][0])[i];
      }
    }
  }
  store<P>(partial, sums, m.cols, first_rank, (rank + 7) / 8 * 8);
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
