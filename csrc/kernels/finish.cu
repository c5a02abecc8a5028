// Adds slices of partial sums in their order, and writes what lora_linear needs of them.
#include <cmath>

#include "skinny_products.h"

namespace rankwise::kernels {
namespace {

constexpr int finish_threads = 256;

__device__ inline void add(float4& sum, const float4& term) {
  sum.x += term.x;
  sum.y += term.y;
  sum.z += term.z;
  sum.w += term.w;
}

// A thread has a row and four neighbouring directions.
template <typename T>
__global__ void __launch_bounds__(finish_threads) finish_rows(FinishRows p) {
  const int fours = static_cast<int>((p.rank + 7) / 8 * 2), rows = finish_threads / fours;
  const int place = static_cast<int>(threadIdx.x) / fours;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows + place;
  const int four = static_cast<int>(threadIdx.x) % fours, first = 4 * four;
  if (place >= rows || row >= p.rows || first >= p.rank) return;
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
    if (p.gated) {
      const float gate = p.E ? static_cast<float>(static_cast<const T*>(p.E)[first + j]) : 1.0f;
      static_cast<T*>(p.gated)[at] = T(p.gated_scale * (value * gate));
    }
  }
}

// A block has 16 columns and 16 directions. Four of its threads share four neighbouring sums: each
// adds a quarter of the slices.
constexpr int finish_cols = 16, finish_ranks = 16, finish_parts = 4;

template <typename T>
__global__ void __launch_bounds__(finish_threads) finish_columns(FinishColumns p) {
  __shared__ float4 of_parts[finish_parts][finish_cols][finish_ranks / 4];
  const int part = static_cast<int>(threadIdx.x) / 64;
  const int four = static_cast<int>(threadIdx.x) % 4,
            place = static_cast<int>(threadIdx.x) / 4 % 16;
  const int64_t pitch = (p.rank + 7) / 8 * 8;
  const int64_t first_col = static_cast<int64_t>(blockIdx.x) * finish_cols;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.y) * finish_ranks;
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

constexpr int gate_threads = 256;

// A block has a direction.
template <typename T>
__global__ void gate_gradient(GateGradient p) {
  __shared__ float sums[gate_threads];
  const int64_t direction = blockIdx.x, pitch = (p.rank + 7) / 8 * 8;
  float sum = 0.0f;
  for (int64_t n = threadIdx.x; n < p.cols; n += gate_threads) {
    const float b = static_cast<float>(static_cast<const T*>(p.B)[n * p.B_stride + direction]);
    sum = std::fma(b, p.g[n * pitch + direction], sum);
  }
  sums[threadIdx.x] = sum;
  for (unsigned half = gate_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) static_cast<T*>(p.dE)[direction] = T(sums[0]);
}

}  // namespace

int launch_finish_rows(const FinishRows& problem, void* stream) {
  if (problem.rows == 0 || problem.rank == 0) return cudaSuccess;
  const int64_t blocks =
      divide_up(problem.rows, finish_threads / (partial_pitch(problem.rank) / 4));
  return with_factor_type(problem.factor_type, [&](auto type) {
    return launch(finish_rows<decltype(type)>, static_cast<unsigned>(blocks), finish_threads, 0,
                  stream, problem);
  });
}

int launch_finish_columns(const FinishColumns& problem, void* stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(problem.cols, finish_cols)),
                  static_cast<unsigned>(divide_up(problem.rank, finish_ranks)));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  return with_factor_type(problem.factor_type, [&](auto type) {
    return launch(finish_columns<decltype(type)>, grid, finish_threads, 0, stream, problem);
  });
}

int launch_gate_gradient(const GateGradient& problem, void* stream) {
  if (problem.rank == 0) return cudaSuccess;
  return with_factor_type(problem.factor_type, [&](auto type) {
    return launch(gate_gradient<decltype(type)>, static_cast<unsigned>(problem.rank), gate_threads,
                  0, stream, problem);
  });
}

}  // namespace rankwise::kernels
