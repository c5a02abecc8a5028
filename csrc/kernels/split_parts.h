// The parts of split_term.h on the device.
#pragma once

#include "number_parts.h"
#include "split_term.h"

namespace rankwise::kernels {

struct SplitValue {
  __nv_bfloat16 high, low;
  __nv_bfloat16 finite;  // `high`, or zero where it is not finite

  // Numbers above bfloat16's largest are cut to it: `low` has the rest.
  __device__ explicit SplitValue(float value) : high(__float2bfloat16_rn(value)) {
    const bool number = is_finite(value);
    if (number && !is_finite(__bfloat162float(high))) high = __float2bfloat16_rz(value);
    const __nv_bfloat16 zero = __float2bfloat16_rn(0.0f);
    low = number ? __float2bfloat16_rn(value - __bfloat162float(high)) : zero;
    finite = number ? high : zero;
  }

 private:
  __device__ static bool is_finite(float value) { return value - value == 0.0f; }
};

// An element of the term's left matrix, or of its right one: parts that meet one another.
__device__ inline void store_split(__nv_bfloat16* to, int64_t part_stride, float value,
                                   bool of_left) {
  const SplitValue split(value);
  to[0] = split.high;
  to[part_stride] = of_left ? split.low : split.finite;
  to[2 * part_stride] = of_left ? split.finite : split.low;
}

// The three parts of a number, `part_stride` elements apart.
__device__ inline void store_cut(void* to, int64_t part_stride, float value) {
  uint32_t parts[3];
  cut(value, 0.0f, parts);
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    static_cast<uint16_t*>(to)[p * part_stride] = static_cast<uint16_t>(parts[p]);
  }
}

// Element i of a matrix, counted row by row.
__device__ inline void split_element(const SplitMatrix& m, int64_t i, bool of_left) {
  if (i >= m.rows * m.cols) return;
  const int64_t row = i / m.cols, col = i % m.cols;
  store_split(static_cast<__nv_bfloat16*>(m.to) + row * m.to_stride + col, m.part_stride,
              m.from[row * m.row_stride + col * m.col_stride], of_left);
}

}  // namespace rankwise::kernels
