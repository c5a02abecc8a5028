// Adds slices of partial sums in their order, and writes what lora_linear needs of them.
#include <cmath>

#include "skinny_products.h"

namespace rankwise::kernels {
namespace {

template <typename T>
__global__ void finish_rows(FinishRows p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.rows * p.rank) return;
  const int64_t row = i / p.rank, direction = i % p.rank, pitch = (p.rank + 7) / 8 * 8;
  const float* from = p.partial + row * pitch + direction;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t slice = 0; slice < p.slices; ++slice) sum += from[slice * p.rows * pitch];
  sum *= p.scale;
  if (p.plain) static_cast<T*>(p.plain)[i] = T(sum);
  if (p.gated) {
    const float gate = static_cast<float>(static_cast<const T*>(p.E)[direction]);
    static_cast<T*>(p.gated)[i] = T(sum * gate);
  }
}

// A thread has a column and four neighbouring directions.
template <typename T>
__global__ void finish_columns(FinishColumns p) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y) * 4;
  const int64_t pitch = (p.rank + 7) / 8 * 8;
  if (col >= p.cols || first >= p.rank) return;
  const float* from = p.partial + col * pitch + first;
  float sums[4] = {};
#pragma unroll 4
  for (int64_t slice = 0; slice < p.slices; ++slice) {
    const float4 four = *reinterpret_cast<const float4*>(from + slice * p.cols * pitch);
    sums[0] += four.x;
    sums[1] += four.y;
    sums[2] += four.z;
    sums[3] += four.w;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t direction = first + i;
    if (direction >= p.rank) return;
    const float sum = p.scale * sums[i];
    if (p.sums) p.sums[col * pitch + direction] = sum;
    if (!p.out) continue;
    const float gate = p.E ? static_cast<float>(static_cast<const T*>(p.E)[direction]) : 1.0f;
    const int64_t at = p.by_rank ? direction * p.out_stride + col : col * p.out_stride + direction;
    static_cast<T*>(p.out)[at] = T(sum * gate);
  }
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
  constexpr unsigned threads = 256;
  const int64_t blocks = divide_up(problem.rows * problem.rank, threads);
  if (blocks == 0) return cudaSuccess;
  return with_factor_type(problem.factor_type, [&](auto type) {
    return launch(finish_rows<decltype(type)>, static_cast<unsigned>(blocks), threads, 0, stream,
                  problem);
  });
}

int launch_finish_columns(const FinishColumns& problem, void* stream) {
  const dim3 block(64, 4);
  const dim3 grid(static_cast<unsigned>(divide_up(problem.cols, block.x)),
                  static_cast<unsigned>(divide_up(problem.rank, 4 * block.y)));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  return with_factor_type(problem.factor_type, [&](auto type) {
    return launch(finish_columns<decltype(type)>, grid, block, 0, stream, problem);
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
