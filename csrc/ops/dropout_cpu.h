// Dropout applied to blocks on the CPU, with the mask made in passing.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace rankwise {

// Which element of the whole [*, total_cols] matrix a block's (0, 0) is.
struct BlockOrigin {
  int64_t row, col, total_cols;
};

// dst[i, j] = kept(origin + (i, j)) ? src[i, j] : 0, converted to dst's dtype and unscaled.
// Both are 2-D with unit column stride; src may be dst; dst's dtype is src's, or float32. The
// threshold is that of an active dropout, 1 .. 65536.
void dropout_copy(const at::Tensor& src, const at::Tensor& dst, BlockOrigin origin, int64_t seed,
                  uint32_t threshold);

}  // namespace rankwise
