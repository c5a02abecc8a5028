// The kernel of split_term.h: a thread for each element of both matrices.
#include "../device.h"
#include "split_term.h"

namespace rankwise::kernels {
namespace {

constexpr int split_threads = 256;

__device__ inline bool is_finite(float value) {
  return value - value == 0.0f;
}

struct Split {
  __nv_bfloat16 high, low;
  __nv_bfloat16 finite;  // `high`, or zero where it is not finite

  // Numbers above bfloat16's largest are cut to it: `low` has the rest.
  __device__ explicit Split(float value) : high(__float2bfloat16_rn(value)) {
    const bool number = is_finite(value);
    if (number && !is_finite(__bfloat162float(high))) high = __float2bfloat16_rz(value);
    const __nv_bfloat16 zero = __float2bfloat16_rn(0.0f);
    low = number ? __float2bfloat16_rn(value - __bfloat162float(high)) : zero;
    finite = number ? high : zero;
  }
};

__global__ void __launch_bounds__(split_threads) split_term(SplitMatrix left, SplitMatrix right) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * split_threads + threadIdx.x;
  const bool of_left = i < left.rows * left.cols;
  if (!of_left) i -= left.rows * left.cols;
  const SplitMatrix m = of_left ? left : right;
  const int64_t row = i / m.cols, col = i % m.cols;
  if (row >= m.rows) return;
  const Split value(m.from[row * m.row_stride + col * m.col_stride]);
  auto* to = static_cast<__nv_bfloat16*>(m.to) + row * m.to_stride + col;
  to[0] = value.high;
  to[m.part_stride] = of_left ? value.low : value.finite;
  to[2 * m.part_stride] = of_left ? value.finite : value.low;
}

}  // namespace

int launch_split_term(const SplitMatrix& left, const SplitMatrix& right, void* stream) {
  const int64_t elements = left.rows * left.cols + right.rows * right.cols;
  const int64_t blocks = (elements + split_threads - 1) / split_threads;
  return launch(split_term, static_cast<unsigned>(blocks), split_threads, 0, stream, left, right);
}

}  // namespace rankwise::kernels
