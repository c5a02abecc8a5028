// The orthogonality penalty: Gram matrices in tiles of 16 x 16, their norms, and the gradient.
#include <cmath>

#include "../with_element_type.h"
#include "orthogonality.h"

namespace rankwise::kernels {
namespace {

constexpr int threads = 256;
constexpr int tile = 16;      // directions
constexpr int features = 64;  // of a tile
constexpr int pitch = features + 4;

int64_t tiles_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// The last entry that starts at or before the block: empty ones start where the next one does.
template <int64_t OrthogonalityEntry::*first_block>
__device__ inline const OrthogonalityEntry& entry_of(const Orthogonality& p, int64_t block) {
  int64_t first = 0, last = p.count - 1;
  while (first < last) {
    const int64_t middle = (first + last + 1) / 2;
    if (p.factors[middle].*first_block <= block) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return p.factors[first];
}

// Copies features [feature, feature + 64) of directions [direction, direction + 16), with zeros
// beyond the active ones. Neighbouring threads read along the smaller stride.
template <typename T>
__device__ inline void load_tile(const OrthogonalityEntry& f, int64_t direction, int64_t feature,
                                 Wide<T> (*out)[pitch]) {
  const bool along_features = f.feature_stride <= f.direction_stride;
  for (int k = static_cast<int>(threadIdx.x); k < tile * features; k += threads) {
    const int i = along_features ? k / features : k % tile;
    const int j = along_features ? k % features : k / tile;
    const bool inside = direction + i < f.rank && feature + j < f.features;
    const int64_t at = (direction + i) * f.direction_stride + (feature + j) * f.feature_stride;
    out[i][j] = inside ? static_cast<Wide<T>>(static_cast<const T*>(f.data)[at]) : Wide<T>(0);
  }
}

// D in tiles: a thread has 4 x 4 elements and every 16th feature.
template <typename T>
__global__ void __launch_bounds__(threads) gram_deviation(Orthogonality p) {
  using Sum = Wide<T>;
  __shared__ Sum left[tile][pitch], right[tile][pitch];
  const OrthogonalityEntry& f = entry_of<&OrthogonalityEntry::first_tile>(p, blockIdx.x);
  const int64_t across = (f.rank + tile - 1) / tile, block = blockIdx.x - f.first_tile;
  const int64_t row = block / across * tile, col = block % across * tile;
  const int lane = static_cast<int>(threadIdx.x), slice = lane % 16;
  const int i = lane / 64 * 4, j = lane / 16 % 4 * 4;
  Sum sums[4][4] = {};
  for (int64_t start = 0; start < f.features; start += features) {
    __syncthreads();
    load_tile<T>(f, row, start, left);
    load_tile<T>(f, col, start, right);
    __syncthreads();
#pragma unroll
    for (int k = slice; k < features; k += 16) {
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) sums[a][b] += left[i + a][k] * right[j + b][k];
      }
    }
  }
  Sum* const out = static_cast<Sum*>(p.deviations) + f.first_sum;
#pragma unroll
  for (int a = 0; a < 4; ++a) {
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      Sum sum = sums[a][b];
      for (int half = 8; half > 0; half /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, half);
      const int64_t to_row = row + i + a, to_col = col + j + b;
      if (slice != 4 * a + b || to_row >= f.rank || to_col >= f.rank) continue;
      out[to_row * f.rank + to_col] = sum - static_cast<Sum>(to_row == to_col ? 1 : 0);
    }
  }
}

// Adds the threads' numbers, in a fixed order; thread 0 has the sum.
__device__ inline double block_sum(double value, double* sums) {
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int half = threads / 2; half > 0; half /= 2) {
    if (threadIdx.x < static_cast<unsigned>(half)) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

// A block has a factor: ||D||^2 or ||D||.
template <typename Sum>
__global__ void orthogonality_terms(Orthogonality p) {
  __shared__ double sums[threads];
  const OrthogonalityEntry& f = p.factors[blockIdx.x];
  const Sum* const d = static_cast<const Sum*>(p.deviations) + f.first_sum;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < f.rank * f.rank; i += threads) {
    sum += static_cast<double>(d[i]) * static_cast<double>(d[i]);
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) p.terms[blockIdx.x] = p.squared ? sum : std::sqrt(sum);
}

template <typename Sum>
__global__ void sum_of_terms(Orthogonality p, Sum* penalty) {
  __shared__ double sums[threads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += threads) sum += p.terms[i];
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) *penalty = static_cast<Sum>(p.squared ? sum : sum / p.count);
}

// What D F is multiplied by.
__device__ inline double gradient_weight(const Orthogonality& p, int64_t factor,
                                         double grad_output) {
  if (p.squared) return 4 * grad_output;
  const double norm = p.terms[factor];
  return norm == 0 ? 0 : 2 * grad_output / static_cast<double>(p.count) / norm;
}

// A block has 16 directions and 64 features of a gradient; a thread one feature and four
// neighbouring directions.
template <typename T>
__global__ void __launch_bounds__(threads)
    orthogonality_gradient(Orthogonality p, const Wide<T>* grad_output) {
  using Sum = Wide<T>;
  __shared__ Sum deviation[tile][tile], rows[tile][pitch];
  const OrthogonalityEntry& f = entry_of<&OrthogonalityEntry::first_gradient_tile>(p, blockIdx.x);
  const int64_t across = (f.features + features - 1) / features;
  const int64_t block = blockIdx.x - f.first_gradient_tile;
  const int64_t direction = block / across * tile, feature = block % across * features;
  const int lane = static_cast<int>(threadIdx.x), i = lane / features * 4, j = lane % features;
  const Sum* const d = static_cast<const Sum*>(p.deviations) + f.first_sum;
  Sum sums[4] = {};
  for (int64_t start = 0; start < f.rank; start += tile) {
    __syncthreads();
    const int64_t from_row = direction + lane / tile, from_col = start + lane % tile;
    const bool inside = from_row < f.rank && from_col < f.rank;
    deviation[lane / tile][lane % tile] = inside ? d[from_row * f.rank + from_col] : Sum(0);
    load_tile<T>(f, start, feature, rows);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < tile; ++k) {
#pragma unroll
      for (int a = 0; a < 4; ++a) sums[a] += deviation[i + a][k] * rows[k][j];
    }
  }
  const double weight = gradient_weight(p, &f - p.factors, static_cast<double>(*grad_output));
  __syncthreads();
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const double gradient = weight * static_cast<double>(sums[a]);
    rows[i + a][j] = direction + i + a < f.rank ? static_cast<Sum>(gradient) : Sum(0);
  }
  __syncthreads();
  T* const out = static_cast<T*>(f.gradient);
  for (int k = lane; k < tile * features; k += threads) {
    const int64_t to = direction + (f.directions_are_rows ? k / features : k % tile);
    const int64_t at = feature + (f.directions_are_rows ? k % features : k / tile);
    if (to >= f.capacity || at >= f.features) continue;
    out[f.directions_are_rows ? to * f.features + at : at * f.capacity + to] =
        static_cast<T>(rows[to - direction][at - feature]);
  }
}

// Calls run(T()) for the factors' type.
template <typename Run>
int with_type(ElementType type, const Run& run) {
  if (type == ElementType::float64) return run(double());
  if (type == ElementType::float32) return run(float());
  return type == ElementType::bfloat16 ? run(__nv_bfloat16()) : run(__half());
}

// D of all factors, and their terms where they are asked for.
template <typename T>
int launch_deviations(const Orthogonality& p, bool terms, void* stream) {
  int error = cudaSuccess;
  if (p.blocks.tiles > 0) {
    error = launch(gram_deviation<T>, static_cast<unsigned>(p.blocks.tiles), threads, 0, stream, p);
  }
  if (error || !terms) return error;
  return launch(orthogonality_terms<Wide<T>>, static_cast<unsigned>(p.count), threads, 0, stream,
                p);
}

}  // namespace

OrthogonalityBlocks lay_out(OrthogonalityEntry* factors, int64_t count) {
  OrthogonalityBlocks all{0, 0, 0};
  for (int64_t i = 0; i < count; ++i) {
    OrthogonalityEntry& f = factors[i];
    f.first_tile = all.tiles;
    f.first_gradient_tile = all.gradient_tiles;
    f.first_sum = all.sums;
    all.tiles += tiles_of(f.rank, tile) * tiles_of(f.rank, tile);
    all.gradient_tiles += tiles_of(f.capacity, tile) * tiles_of(f.features, features);
    all.sums += f.rank * f.rank;
  }
  return all;
}

int launch_orthogonality_penalty(const Orthogonality& problem, void* penalty, void* stream) {
  if (problem.count == 0) return cudaSuccess;
  return with_type(problem.type, [&](auto type) {
    using T = decltype(type);
    const int error = launch_deviations<T>(problem, true, stream);
    return error ? error
                 : launch(sum_of_terms<Wide<T>>, 1, threads, 0, stream, problem,
                          static_cast<Wide<T>*>(penalty));
  });
}

int launch_orthogonality_gradient(const Orthogonality& problem, const void* grad_output,
                                  void* stream) {
  if (problem.blocks.gradient_tiles == 0) return cudaSuccess;
  return with_type(problem.type, [&](auto type) {
    using T = decltype(type);
    const int error = launch_deviations<T>(problem, !problem.squared, stream);
    return error ? error
                 : launch(orthogonality_gradient<T>,
                          static_cast<unsigned>(problem.blocks.gradient_tiles), threads, 0, stream,
                          problem, static_cast<const Wide<T>*>(grad_output));
  });
}

}  // namespace rankwise::kernels
