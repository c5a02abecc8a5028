// The kernel of split_term.h: a thread for each element of both matrices.
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

}  // namespace

int launch_split_term(const SplitMatrix& left, const SplitMatrix& right, void* stream) {
  const int64_t elements = left.rows * left.cols + right.rows * right.cols;
  const int64_t blocks = (elements + split_threads - 1) / split_threads;
  return launch(split_term, static_cast<unsigned>(blocks), split_threads, 0, stream, left, right);
}

}  // namespace rankwise::kernels
