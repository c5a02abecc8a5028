// Adds slices of partial sums in their order, and writes what lora_linear needs of them: one
// kernel, whose blocks are divided among what there is to do.
#include <cmath>

#include "skinny_products.h"
#include "split_parts.h"

namespace rankwise::kernels {
namespace {

constexpr int finish_threads = 256;

__device__ inline void add(float4& sum, const float4& term) {
  sum.x += term.x;
  sum.y += term.y;
  sum.z += term.z;
  sum.w += term.w;
}

template <typename T>
__device__ inline void store_term(const TermLeft& term, int64_t row, int64_t direction,
                                  int64_t rank, float value) {
  const int64_t at = row * term.stride + direction;
  if constexpr (std::is_same_v<T, float>) {
    if (term.split) {
      store_split(static_cast<__nv_bfloat16*>(term.data) + at, rank, value, /*of_left=*/true);
      return;
    }
  }
  static_cast<T*>(term.data)[at] = T(value);
}

// A thread has a row and four neighbouring directions.
template <typename T>
__device__ void finish_rows(const FinishRows& p, int64_t block) {
  const int fours = static_cast<int>((p.rank + 7) / 8 * 2), rows = finish_threads / fours;
  const int place = static_cast<int>(threadIdx.x) / fours;
  const int64_t row = block * rows + place;
  const int four = static_cast<int>(threadIdx.x) % fours, first = 4 * four;
  if (place >= rows || row >= p.rows || first >= p.rank) return;
  if (p.cut && four == 0) {
    for (int64_t i = p.rank; i < cut_rank; ++i) {
      store_cut(static_cast<uint16_t*>(p.cut) + row * cut_rows + i, cut_rank, 0.0f);
    }
  }
  const auto* from = reinterpret_cast<const float4*>(p.partial) + row * fours + four;
  float4 sum = {};
#pragma unroll 4
  for (int64_t slice = 0; slice < p.slices; ++slice) add(sum, from[slice * p.rows * fours]);
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (first + j >= p.rank) return;
    const int64_t at = row * p.rank + first + j;
    const float value = p.scale * sums[j];
    if (p.plain) static_cast<T*>(p.plain)[at] = T(value);
    const float gate = p.E ? static_cast<float>(static_cast<const T*>(p.E)[first + j]) : 1.0f;
    const float gated = p.gated_scale * (value * gate);
    if (p.gated) static_cast<T*>(p.gated)[at] = T(gated);
    if (p.term.data) store_term<T>(p.term, row, first + j, p.rank, gated);
    if (p.cut)
      store_cut(static_cast<uint16_t*>(p.cut) + row * cut_rows + first + j, cut_rank, gated);
  }
}

// A block has 16 columns and 16 directions. Four of its threads share four neighbouring sums: each
// adds a quarter of the slices.
constexpr int finish_cols = 16, finish_ranks = 16, finish_parts = 4;

template <typename T>
__device__ void finish_columns(const FinishColumns& p, int64_t block) {
  __shared__ float4 of_parts[finish_parts][finish_cols][finish_ranks / 4];
  const int part = static_cast<int>(threadIdx.x) / 64;
  const int four = static_cast<int>(threadIdx.x) % 4,
            place = static_cast<int>(threadIdx.x) / 4 % 16;
  const int64_t pitch = (p.rank + 7) / 8 * 8;
  const int64_t down = (p.cols + finish_cols - 1) / finish_cols;
  const int64_t first_col = block % down * finish_cols, first_rank = block / down * finish_ranks;
  const int64_t each = (p.slices + finish_parts - 1) / finish_parts;
  const int64_t last = p.slices < (part + 1) * each ? p.slices : (part + 1) * each;
  float4 sum = {};
  if (first_col + place < p.cols && first_rank + 4 * four < pitch) {
    const float* from = p.partial + (first_col + place) * pitch + first_rank + 4 * four;
#pragma unroll 4
    for (int64_t slice = part * each; slice < last; ++slice) {
      add(sum, *reinterpret_cast<const float4*>(from + slice * p.cols * pitch));
    }
  }
  of_parts[part][place][four] = sum;
  __syncthreads();
  // One sum for each thread, neighbours along what is contiguous in the result.
  const int i = static_cast<int>(threadIdx.x);
  const int col_of = p.by_rank ? i % 16 : i / 16, rank_of = p.by_rank ? i / 16 : i % 16;
  const int64_t col = first_col + col_of, direction = first_rank + rank_of;
  if (col >= p.cols || direction >= p.rank) return;
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < finish_parts; ++j) {
    total += reinterpret_cast<const float*>(&of_parts[j][col_of][0])[rank_of];
  }
  total *= p.scale;
  if (p.sums) p.sums[col * pitch + direction] = total;
  if (!p.out) return;
  const float gate = p.E ? static_cast<float>(static_cast<const T*>(p.E)[direction]) : 1.0f;
  const int64_t at = p.by_rank ? direction * p.out_stride + col : col * p.out_stride + direction;
  static_cast<T*>(p.out)[at] = T(total * gate);
}

// A block has a direction.
template <typename T>
__device__ void finish_gate(const GateGradient& p, int64_t direction) {
  __shared__ float sums[finish_threads];
  const int64_t pitch = (p.rank + 7) / 8 * 8;
  float sum = 0.0f;
  for (int64_t n = threadIdx.x; n < p.cols; n += finish_threads) {
    const float b = static_cast<float>(static_cast<const T*>(p.B)[n * p.B_stride + direction]);
    sum = std::fma(b, p.g[n * pitch + direction], sum);
  }
  sums[threadIdx.x] = sum;
  for (unsigned half = finish_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) static_cast<T*>(p.dE)[direction] = T(sums[0]);
}

// The first block that is none of a part's any more.
struct Ends {
  int64_t rows, columns, gate, term_right;

  explicit Ends(const Finish& p)
      : rows(p.rows.rank > 0
                 ? divide_up(p.rows.rows, finish_threads / (partial_pitch(p.rows.rank) / 4))
                 : 0),
        columns(rows +
                divide_up(p.columns.cols, finish_cols) * divide_up(p.columns.rank, finish_ranks)),
        gate(columns + p.gate.rank),
        term_right(gate + divide_up(p.term_right.rows * p.term_right.cols, finish_threads)) {}
};

template <typename T>
__global__ void __launch_bounds__(finish_threads) finish(Finish p, Ends ends) {
  const int64_t block = blockIdx.x;
  if (block < ends.rows) {
    finish_rows<T>(p.rows, block);
  } else if (block < ends.columns) {
    finish_columns<T>(p.columns, block - ends.rows);
  } else if (block < ends.gate) {
    finish_gate<T>(p.gate, block - ends.columns);
  } else {
    split_element(p.term_right, (block - ends.gate) * finish_threads + threadIdx.x,
                  /*of_left=*/false);
  }
}

}  // namespace

int launch_finish(const Finish& problem, void* stream) {
  const Ends ends(problem);
  if (ends.term_right == 0) return cudaSuccess;
  return with_factor_type(problem.factor_type, [&](auto type) {
    return launch(finish<decltype(type)>, static_cast<unsigned>(ends.term_right), finish_threads, 0,
                  stream, problem, ends);
  });
}

}  // namespace rankwise::kernels
