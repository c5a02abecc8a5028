// Operands of tensor-core products, from tiles in shared memory.
//
// Numbers that the tensor core does not take as they are, are cut into parts (number_parts.h):
// three for float32, two for float16. Products of all parts with all parts are exact.
//
// The tensor core cuts its running sum where float32 rounds it, and loses a little at each step and
// always in one direction. Its sums of parts therefore leave it after each sixteen products and are
// added up in registers, rounded: they are then better than float32's own sums. Sums of numbers of
// 16 bits stay in it: what they lose is far below the rounding of their results.
#pragma once

#include "number_parts.h"
#include "tiles.h"

namespace rankwise::kernels {

// How many parts an operand of type T has, beside operands of type Other.
template <typename T, typename Other>
constexpr int part_count = std::is_same_v<T, Other> && sizeof(T) == 2 ? 1
                           : std::is_same_v<T, float>                 ? 3
                           : std::is_same_v<T, __half>                ? 2
                                                                      : 1;

// The type that the tensor core multiplies.
template <typename T, typename Other>
using Multiplied = std::conditional_t<std::is_same_v<T, Other> && sizeof(T) == 2, T, __nv_bfloat16>;

// fragments[p][j]: part p of the pair in place j.
template <int parts>
__device__ inline void split(float low, float high, int j, uint32_t (&fragments)[parts][4]) {
  uint32_t pair[parts];
  cut(low, high, pair);
#pragma unroll
  for (int p = 0; p < parts; ++p) fragments[p][j] = pair[p];
}

// 16 x 16 elements (i, k) of an operand, i counting the product's rows or columns and k what is
// summed; they lie at tile[i * pitch + k] or, with `transposed`, at tile[k * pitch + i].
// Place j of a fragment has i below 8 for j = 0, 2 and k below 8 for j = 0, 1: the order of mma's
// first operand. Its second operand's two columns of 8 are places {0, 2} and {1, 3}.
template <bool transposed, int pitch, typename T, int parts>
__device__ inline void load_fragment(const T* tile, uint32_t (&fragments)[parts][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (parts == 1) {
    static_assert(sizeof(T) == 2, "a number of one part has 16 bits");
    const int row = transposed ? lane % 8 + lane / 16 * 8 : lane % 16;
    const int col = transposed ? lane / 8 % 2 * 8 : lane / 16 * 8;
    load_matrices<transposed>(fragments[0], tile + row * pitch + col);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = lane / 4 + j % 2 * 8, k = lane % 4 * 2 + j / 2 * 8;
      const T* pair = transposed ? tile + k * pitch + i : tile + i * pitch + k;
      split(static_cast<float>(pair[0]), static_cast<float>(pair[transposed ? pitch : 1]), j,
            fragments);
    }
  }
}

// An operand in shared memory: element (i, k) lies at tile[i * pitch + k] or, with `transposed`, at
// tile[k * pitch + i]; `parts` as above.
template <typename T, int pitch_, bool transposed_, int parts_>
struct Operand {
  static constexpr int parts = parts_;
  const T* tile;

  __device__ void load(int i, int k, uint32_t (&fragments)[parts][4]) const {
    const T* first = transposed_ ? tile + k * pitch_ + i : tile + i * pitch_ + k;
    load_fragment<transposed_, pitch_>(first, fragments);
  }
};

// Like Operand, for numbers that were cut beforehand: part p lies `plane` elements further on.
template <typename T, int pitch_, bool transposed_, int parts_, int plane>
struct CutOperand {
  static constexpr int parts = parts_;
  const T* tile;

  __device__ void load(int i, int k, uint32_t (&fragments)[parts][4]) const {
    const T* first = transposed_ ? tile + k * pitch_ + i : tile + i * pitch_ + k;
    uint32_t one[1][4];
#pragma unroll
    for (int p = 0; p < parts; ++p) {
      load_fragment<transposed_, pitch_>(first + p * plane, one);
#pragma unroll
      for (int j = 0; j < 4; ++j) fragments[p][j] = one[0][j];
    }
  }
};

// A tile of float32 numbers cut into `parts` bfloat16 parts each, in planes of shared memory. It
// comes by way of registers: load() what store() then cuts.
template <int tile_rows, int tile_cols, int threads, int parts>
struct CutTile {
  using Geometry = Tile<float, tile_rows, tile_cols, threads>;
  static constexpr int pitch = Geometry::pitch, plane = tile_rows * pitch;
  static constexpr int bytes = parts * plane * static_cast<int>(sizeof(__nv_bfloat16));

  struct Held {
    Piece<float> pieces[Geometry::each];
  };

  __device__ static void load(Held& held, const Part<float>& part) {
    const int row = Geometry::first_row(), col = Geometry::first_col();
    const int rows = clamped(part.matrix.rows - part.row, tile_rows);
    const int count = clamped(part.matrix.cols - part.col - col, piece);
    const float* from = part.matrix.data + (part.row + row) * part.matrix.stride + part.col + col;
    const int64_t step = Geometry::row_step * part.matrix.stride;
#pragma unroll
    for (int i = 0; i < Geometry::each; ++i) {
      const bool valid = Geometry::has(i) && row + i * Geometry::row_step < rows;
      held.pieces[i].load(from, valid ? count : 0, part.matrix.alignment);
      from += step;
    }
  }

  __device__ static void store(__nv_bfloat16* planes, const Held& held) {
    const int row = Geometry::first_row(), col = Geometry::first_col();
    __nv_bfloat16* to = planes + row * pitch + col;
#pragma unroll
    for (int i = 0; i < Geometry::each; ++i) {
      if (!Geometry::has(i)) continue;
      uint32_t pairs[piece / 2][parts];
#pragma unroll
      for (int j = 0; j < piece / 2; ++j) {
        cut(held.pieces[i].value[2 * j], held.pieces[i].value[2 * j + 1], pairs[j]);
      }
#pragma unroll
      for (int p = 0; p < parts; ++p) {
        *reinterpret_cast<uint4*>(to + p * plane + i * Geometry::row_step * pitch) =
            make_uint4(pairs[0][p], pairs[1][p], pairs[2][p], pairs[3][p]);
      }
    }
  }
};

// sums += a b for column n of 8 of b, smallest products first: the product of parts p and q is of
// order p + q, from `most` down to `least`.
template <typename Mma, int most = 4, int least = 0, int parts_a, int parts_b>
__device__ inline void multiply_fragments(float (&sums)[4], const uint32_t (&a)[parts_a][4],
                                          const uint32_t (&b)[parts_b][4], int n) {
#pragma unroll
  for (int order = most; order >= least; --order) {
#pragma unroll
    for (int p = 0; p < parts_a; ++p) {
      if (order - p < 0 || order - p >= parts_b) continue;
      const uint32_t column[2] = {b[order - p][n], b[order - p][n + 2]};
      multiply_add<Mma>(sums, a[p], column);
    }
  }
}

// The same, the tensor core being left where operands have parts. Apart from the smaller ones, the
// largest products lose hardly a bit.
template <typename Mma, int parts_a, int parts_b>
__device__ inline void add_fragments(float (&sums)[4], const uint32_t (&a)[parts_a][4],
                                     const uint32_t (&b)[parts_b][4], int n) {
  if constexpr (parts_b == 1) {
    multiply_fragments<Mma>(sums, a, b, n);
  } else {
    float largest[4] = {}, smaller[4] = {};
    multiply_fragments<Mma, 4, 1>(smaller, a, b, n);
    multiply_fragments<Mma, 0>(largest, a, b, n);
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] += largest[j] + smaller[j];
  }
}

// sums[i][n] += rows 16 i.. of a times columns 8 n.. of b, over k below `depth`, for the columns
// below `cols`. A warp's sums: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the
// next one.
template <typename Mma, int depth, typename A, typename B, int groups, int columns>
__device__ inline void add_product(const A& a, const B& b, int cols,
                                   float (&sums)[groups][columns][4]) {
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    uint32_t rows_of_a[groups][A::parts][4];
#pragma unroll
    for (int i = 0; i < groups; ++i) a.load(16 * i, k, rows_of_a[i]);
#pragma unroll
    for (int n = 0; n < columns; n += 2) {
      if (8 * n >= cols) continue;
      uint32_t columns_of_b[B::parts][4];
      b.load(8 * n, k, columns_of_b);
#pragma unroll
      for (int i = 0; i < groups; ++i) {
        add_fragments<Mma>(sums[i][n], rows_of_a[i], columns_of_b, 0);
        if (n + 1 < columns) add_fragments<Mma>(sums[i][n + 1], rows_of_a[i], columns_of_b, 1);
      }
    }
  }
}

// Adds the sums of `others` further warps, `warps` apart, to each of the first `warps` warps', in
// order. `room` has (others) * warps * 32 * count floats, and nothing else is done with it.
template <int warps, int others, int groups, int columns>
__device__ inline void gather_sums(float* room, float (&sums)[groups][columns][4]) {
  if constexpr (others > 0) {
    constexpr int count = groups * columns * 4;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (warp >= warps) {
      float* to = room + (warp - warps) * count * 32 + lane;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        to[32 * i] = sums[i / 4 / columns][i / 4 % columns][i % 4];
      }
    }
    __syncthreads();
    if (warp < warps) {
#pragma unroll
      for (int other = 0; other < others; ++other) {
        const float* from = room + (other * warps + warp) * count * 32 + lane;
#pragma unroll
        for (int i = 0; i < count; ++i) {
          sums[i / 4 / columns][i / 4 % columns][i % 4] += from[32 * i];
        }
      }
    }
  }
}

// Writes a warp's sums to rows first.. of a slice [rows, pitch], from column first_col on.
template <int groups, int columns>
__device__ inline void store_sums(float* slice, const float (&sums)[groups][columns][4],
                                  int64_t first, int64_t rows, int64_t first_col, int64_t pitch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2 * groups; ++i) {
    const int64_t row = first + 8 * i + lane / 4;
    if (row >= rows) continue;
    float* to = slice + row * pitch + first_col + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < columns; ++n) {
      if (first_col + 8 * n >= pitch) continue;
      const float* pair = &sums[i / 2][n][i % 2 * 2];
      *reinterpret_cast<float2*>(to + 8 * n) = make_float2(pair[0], pair[1]);
    }
  }
}

}  // namespace rankwise::kernels
