// The importance passes on the device. Compiled without fused multiply-adds (CMakeLists.txt), so
// that averages have the CPU's bits.
#include "../with_element_type.h"
#include "importance.h"
#include "importance_kernels.h"

namespace rankwise::kernels {
namespace {

constexpr int threads = 256;
constexpr int64_t block_elements = 8192;

RANKWISE_HOST_DEVICE inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

RANKWISE_HOST_DEVICE inline int64_t parts_of(int64_t count, int64_t part) {
  return (count + part - 1) / part;
}

// How a factor is cut into one rectangle for each block. Of directions in rows a block has a part
// of one row and one sum, else some rows of up to `threads` columns and their sums.
struct Cut {
  int64_t rows, cols;            // of a rectangle
  int64_t row_parts, col_parts;  // blocks along each side

  RANKWISE_HOST_DEVICE explicit Cut(const FactorEntry& f)
      : rows(1), cols(block_elements), row_parts(0), col_parts(0) {
    if (!f.directions_are_rows) {
      cols = least(f.cols, threads);
      rows = block_elements / (cols > 0 ? cols : 1);
    }
    col_parts = cols > 0 ? parts_of(f.cols, cols) : 0;
    row_parts = parts_of(f.rows, rows);
  }
};

// The last entry that starts at or before the block: empty ones start where the next one does.
template <typename Entry>
__device__ inline const Entry& entry_of(const Entry* entries, int64_t count, int64_t block) {
  int64_t first = 0, last = count - 1;
  while (first < last) {
    const int64_t middle = (first + last + 1) / 2;
    if (entries[middle].first_block <= block) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return entries[first];
}

__global__ void check_gradients(const GradientEntry* gradients, int64_t count, bool* found) {
  const GradientEntry& gradient = entry_of(gradients, count, blockIdx.x);
  const int64_t first = (blockIdx.x - gradient.first_block) * block_elements;
  const int64_t last = least(first + block_elements, gradient.count);
  bool not_finite = false, nonzero = false;
  with_element_type(gradient.type, [&](auto type) {
    using T = decltype(type);
    const T* const data = static_cast<const T*>(gradient.data);
#pragma unroll 4
    for (int64_t i = first + threadIdx.x; i < last; i += threads) {
      const auto value = static_cast<Wide<T>>(data[i]);
      not_finite |= !(value - value == 0);  // NaN for what is not finite
      nonzero |= value != 0;
    }
  });
  not_finite = __any_sync(0xFFFFFFFFu, not_finite);
  nonzero = __any_sync(0xFFFFFFFFu, nonzero);
  if (threadIdx.x % 32 != 0) return;
  // All that is ever stored is true; asking first spares most of the stores to one address.
  if (not_finite && !found[0]) found[0] = true;
  if (nonzero && !found[1]) found[1] = true;
}

// The elements of one thread.
struct Walk {
  int64_t first, step, end;
};

// Takes the gradient into the elements' averages; their scores added up in the order of the walk.
template <typename Stored>
__device__ inline double update(const FactorEntry& f, const Walk& walk, bool step, bool score,
                                const Decay<Wide<Stored>>& decay) {
  using T = Wide<Stored>;
  const Stored* __restrict__ const parameter = static_cast<const Stored*>(f.parameter);
  const Stored* __restrict__ const gradient = static_cast<const Stored*>(f.gradient);
  T* __restrict__ const sensitivity = static_cast<T*>(f.sensitivity);
  T* __restrict__ const uncertainty = static_cast<T*>(f.uncertainty);
  double sum = 0;
#pragma unroll 4
  for (int64_t i = walk.first; i < walk.end; i += walk.step) {
    T s = sensitivity[i], u = uncertainty[i];
    if (step) {
      update_importance(static_cast<T>(parameter[i]), static_cast<T>(gradient[i]), decay, s, u);
      sensitivity[i] = s;
      uncertainty[i] = u;
    }
    if (score) sum += element_score(s, u);
  }
  return sum;
}

__global__ void __launch_bounds__(threads) importance_step(ImportanceStep p) {
  __shared__ double sums[threads];
  const FactorEntry& f = entry_of(p.factors, p.count, blockIdx.x);
  const bool step = f.gradient && !(p.progress && !p.progress->updates);
  const bool score = p.partials && !(p.progress && p.progress->budget < 0);
  if (!step && !score) return;
  const Cut cut(f);
  const int64_t block = blockIdx.x - f.first_block;
  const int64_t row = block / cut.col_parts * cut.rows, col = block % cut.col_parts * cut.cols;
  const int64_t rows = least(cut.rows, f.rows - row), cols = least(cut.cols, f.cols - col);
  const int lane = static_cast<int>(threadIdx.x);
  const int width = static_cast<int>(least(cols, threads)), groups = threads / width;
  Walk walk{row * f.cols + col + lane, threads, row * f.cols + col + cols};
  if (!f.directions_are_rows) {  // a thread keeps to its column
    walk.first = (row + lane / width) * f.cols + col + lane % width;
    walk.step = groups * f.cols;
    walk.end = lane < groups * width ? (row + rows) * f.cols : 0;
  }
  with_element_type(f.type, [&](auto type) {
    using Stored = decltype(type);
    const Decay<Wide<Stored>> decay(p.beta1, p.beta2);
    sums[lane] = update<Stored>(f, walk, step, score, decay);
  });
  if (!score) return;
  __syncthreads();
  double* const partials = p.partials + f.first_partial;
  if (!f.directions_are_rows) {
    if (lane >= width) return;
    double sum = sums[lane];
    for (int group = 1; group < groups; ++group) sum += sums[group * width + lane];
    partials[row / cut.rows * f.cols + col + lane] = sum;
    return;
  }
  for (int half = threads / 2; half > 0; half /= 2) {
    if (lane < half) sums[lane] += sums[lane + half];
    __syncthreads();
  }
  if (lane == 0) partials[block] = sums[0];
}

// The sum over direction i of a factor.
__device__ inline double direction_sum(const FactorEntry& f, const double* partials, int64_t i) {
  const Cut cut(f);
  const bool rows = f.directions_are_rows;
  const double* part = partials + f.first_partial + (rows ? i * cut.col_parts : i);
  const int64_t parts = rows ? cut.col_parts : cut.row_parts, step = rows ? 1 : f.cols;
  double sum = 0;
  for (int64_t j = 0; j < parts; ++j) sum += part[j * step];
  return sum;
}

// A block has an adapter.
__global__ void importance_scores(const FactorEntry* factors, const int64_t* offsets,
                                  const Progress* progress, const double* partials,
                                  double* scores) {
  if (progress && progress->budget < 0) return;
  const FactorEntry *A = factors + 3 * static_cast<int64_t>(blockIdx.x), *B = A + 1, *E = A + 2;
  const int64_t first = offsets[blockIdx.x], rank = offsets[blockIdx.x + 1] - first;
  for (int64_t i = threadIdx.x; i < rank; i += blockDim.x) {
    const double mean_A = direction_sum(*A, partials, i) / static_cast<double>(A->cols);
    const double mean_B = direction_sum(*B, partials, i) / static_cast<double>(B->rows);
    scores[first + i] = direction_sum(*E, partials, i) + (mean_A + mean_B);
  }
}

}  // namespace

int64_t lay_out(GradientEntry* gradients, int64_t count) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    gradients[i].first_block = blocks;
    blocks += parts_of(gradients[i].count, block_elements);
  }
  return blocks;
}

FactorBlocks lay_out(FactorEntry* factors, int64_t count) {
  FactorBlocks all{0, 0};
  for (int64_t i = 0; i < count; ++i) {
    FactorEntry& f = factors[i];
    const Cut cut(f);
    f.first_block = all.blocks;
    f.first_partial = all.partials;
    all.blocks += cut.row_parts * cut.col_parts;
    all.partials += cut.row_parts * (f.directions_are_rows ? cut.col_parts : f.cols);
  }
  return all;
}

int launch_importance_check(const GradientEntry* gradients, int64_t count, int64_t blocks,
                            bool* found, void* stream) {
  if (blocks == 0) return cudaSuccess;
  return launch(check_gradients, static_cast<unsigned>(blocks), threads, 0, stream, gradients,
                count, found);
}

int launch_importance_step(const ImportanceStep& problem, void* stream) {
  if (problem.blocks == 0) return cudaSuccess;
  return launch(importance_step, static_cast<unsigned>(problem.blocks), threads, 0, stream,
                problem);
}

int launch_importance_scores(const FactorEntry* factors, const int64_t* offsets, int64_t adapters,
                             const Progress* progress, const double* partials, double* scores,
                             void* stream) {
  if (adapters == 0) return cudaSuccess;
  return launch(importance_scores, static_cast<unsigned>(adapters), 64, 0, stream, factors, offsets,
                progress, partials, scores);
}

}  // namespace rankwise::kernels
