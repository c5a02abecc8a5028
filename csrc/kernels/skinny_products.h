// The passes behind lora_linear.h: products of a wide matrix with a skinny one as slices of partial
// sums, and the kernel that adds the slices up.
#pragma once

#include "tiles.h"

namespace rankwise::kernels {

// Shared memory of a block on sm_86 and sm_89, the least among sm_80 and later.
constexpr int largest_shared_bytes = 99 * 1024;

template <typename Wide_, typename Factor_>
struct Types {
  using Wide = Wide_;
  using Factor = Factor_;
};

// Calls run(Types<...>()); returns cudaErrorInvalidValue for types that no kernel is made for.
template <typename Run>
int with_types(Type wide, Type factor, const Run& run) {
  if (wide == Type::float32 && factor == wide) return run(Types<float, float>());
  if (wide == Type::bfloat16 && factor == wide) return run(Types<__nv_bfloat16, __nv_bfloat16>());
  if (wide == Type::float16 && factor == wide) return run(Types<__half, __half>());
  if (factor != Type::float32) return cudaErrorInvalidValue;
  if (wide == Type::bfloat16) return run(Types<__nv_bfloat16, float>());
  return run(Types<__half, float>());
}

// Calls run(T()) for the factors' type.
template <typename Run>
int with_factor_type(Type type, const Run& run) {
  if (type == Type::float32) return run(float());
  return type == Type::bfloat16 ? run(__nv_bfloat16()) : run(__half());
}

constexpr int64_t divide_up(int64_t value, int64_t step) {
  return (value + step - 1) / step;
}

// Floats between the rows of partial sums: the rank, rounded up to the tensor core's eight columns.
constexpr int64_t partial_pitch(int64_t rank) {
  return divide_up(rank, 8) * 8;
}

// How a sum is divided among blocks: `count` chunks of `tiles` tiles each, a function of the shape.
struct Chunks {
  int64_t tiles, count;
};

// Two blocks for each of an H100's 132 multiprocessors, of at least `least_tiles` tiles each.
inline Chunks divide_sum(int64_t tiles, int64_t blocks_per_chunk, int64_t least_tiles) {
  constexpr int64_t wanted_blocks = 264;
  int64_t count = wanted_blocks / (blocks_per_chunk > 0 ? blocks_per_chunk : 1);
  if (count > tiles / least_tiles) count = tiles / least_tiles;
  if (count < 1) count = 1;
  const int64_t each = divide_up(tiles, count);
  return {each, each > 0 ? divide_up(tiles, each) : 0};
}

// partial[chunk][i][:] = sums over the chunk's columns j of mask(m)[i, j] factor[:, j];
// factor [rank, cols], or [cols, rank] with `factor_by_column`.
struct RowProducts {
  Type wide_type, factor_type;
  int64_t rows, cols, rank;
  const void* m;
  int64_t m_stride;
  const void* factor;
  int64_t factor_stride;
  bool factor_by_column;
  DropoutMask dropout;
};
Chunks row_product_chunks(const RowProducts& problem);
int launch_row_products(const RowProducts& problem, float* partial, void* stream);

// partial[chunk][j][:] = sums over the chunk's rows i of mask(m)[i, j] skinny[i, :];
// skinny [rows, rank].
struct ColumnProducts {
  Type wide_type, factor_type;
  int64_t rows, cols, rank;
  const void* m;
  int64_t m_stride;
  const void* skinny;
  DropoutMask dropout;
};
Chunks column_product_chunks(const ColumnProducts& problem);
int launch_column_products(const ColumnProducts& problem, float* partial, void* stream);

// RowProducts with B and ColumnProducts with hidden in one read of dy, for 16-bit dy and up to 32
// directions of its type or 16 of float32. `of_rows` counts the slices of the column products,
// `of_columns` those of the row products.
struct OutputProducts {
  Type wide_type, factor_type;
  int64_t rows, cols, rank;
  const void* dy;
  int64_t dy_stride;
  const void* B;
  int64_t B_stride;
  const void* hidden;
};
struct OutputChunks {
  Chunks of_rows, of_columns;
};
bool output_products_fit(const OutputProducts& problem);
OutputChunks output_product_chunks(const OutputProducts& problem);
int launch_output_products(const OutputProducts& problem, float* row_partial, float* column_partial,
                           void* stream);

// With s = scale * (slices added in order), [rows, rank]: plain = s, gated = gated_scale * s o E^T,
// `term` as `gated`, and `cut` its three parts (split_term.h), of float32.
struct FinishRows {
  int64_t rows = 0, rank = 0, slices = 0;
  const float* partial = nullptr;
  float scale = 1.0f;
  const void* E = nullptr;  // [rank], or null
  void* plain = nullptr;    // or null
  void* gated = nullptr;    // or null
  float gated_scale = 1.0f;
  TermLeft term = {};
  void* cut = nullptr;  // [rows, cut_rows], or null
};

// With s = scale * (slices added in order), [cols, rank]: out = s o E^T (s without E), written as
// [cols, rank] or, `by_rank`, as [rank, cols]. `sums` takes s itself, pitched like the slices; it
// may be the first slice.
struct FinishColumns {
  int64_t cols = 0, rank = 0, slices = 0;
  const float* partial = nullptr;
  float scale = 1.0f;
  const void* E = nullptr;  // or null
  void* out = nullptr;      // or null
  int64_t out_stride = 0;
  bool by_rank = false;
  float* sums = nullptr;  // or null
};

// Work of one launch, in which no part reads what another writes; none where there are no rows or
// columns. All of the factors' type.
struct Finish {
  Type factor_type;
  FinishRows rows = {};
  FinishColumns columns = {};
  GateGradient gate = {};
  SplitMatrix term_right = {};
};
int launch_finish(const Finish& problem, void* stream);

}  // namespace rankwise::kernels
