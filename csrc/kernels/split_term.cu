// The kernels of split_term.h: a thread for each element of both matrices.
#include "split_parts.h"

namespace rankwise::kernels {
namespace {

constexpr int split_threads = 256;

__global__ void __launch_bounds__(split_threads) split_term(SplitMatrix left, SplitMatrix right) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * split_threads + threadIdx.x;
  const int64_t of_left = left.rows * left.cols;
  if (i < of_left) {
    split_element(left, i, /*of_left=*/true);
  } else {
    split_element(right, i - of_left, /*of_left=*/false);
  }
}

__global__ void __launch_bounds__(split_threads) cut_factor(CutFactor factor, SplitMatrix right) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * split_threads + threadIdx.x;
  const int64_t of_factor = cut_rank * factor.length;
  if (i >= of_factor) {
    split_element(right, i - of_factor, /*of_left=*/false);
    return;
  }
  const int64_t row = i / factor.length, col = i % factor.length;
  const float value = row < factor.rank ? factor.from[row * factor.from_stride + col] : 0.0f;
  store_cut(static_cast<uint16_t*>(factor.to) + row * factor.to_stride + col,
            cut_rank * factor.to_stride, value);
}

int64_t blocks_for(int64_t elements) {
  return (elements + split_threads - 1) / split_threads;
}

}  // namespace

int launch_cut_factor(const CutFactor& factor, const SplitMatrix& right, void* stream) {
  const int64_t blocks = blocks_for(cut_rank * factor.length + right.rows * right.cols);
  return launch(cut_factor, static_cast<unsigned>(blocks), split_threads, 0, stream, factor, right);
}

int launch_split_term(const SplitMatrix& left, const SplitMatrix& right, void* stream) {
  const int64_t blocks = blocks_for(left.rows * left.cols + right.rows * right.cols);
  return launch(split_term, static_cast<unsigned>(blocks), split_threads, 0, stream, left, right);
}

}  // namespace rankwise::kernels
