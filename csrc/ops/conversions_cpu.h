// Tiles of float32 sums as results of their type, and bfloat16 numbers as float32.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace rankwise {

// to[i, j] = sums[i, j] + update[i, j] or + row[j], rounded to nearest even: rows of
// sums lie sums_stride apart, those of update cols; of update and row, one at most is not null.
void finish_tile(const float* sums, int64_t sums_stride, const float* update, const float* row,
                 int64_t rows, int64_t cols, float* to, int64_t stride);
void finish_tile(const float* sums, int64_t sums_stride, const float* update, const float* row,
                 int64_t rows, int64_t cols, at::BFloat16* to, int64_t stride);

void widen_row(const at::BFloat16* from, float* to, int64_t count);

}  // namespace rankwise
