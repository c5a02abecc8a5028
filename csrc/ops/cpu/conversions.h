// Tiles of float32 sums as results of their type, and bfloat16 numbers as float32.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "blocks.h"
#include "dropout.h"

namespace rankwise {

// to[i, j] = sums[i, j] + row[j], rounded to nearest even; row may be null, for zeros.
template <typename To>
void add_row(Rows<const float> sums, const float* row, int64_t rows, int64_t cols, Rows<To> to);

// to[i, j] = sums[i, j] + (kept(i, j) ? update[i, j] : 0), rounded to nearest even.
template <typename To>
void add_kept(Rows<const float> sums, Rows<const float> update, KeptBits kept, int64_t rows,
              int64_t cols, Rows<To> to);

void widen_row(const at::BFloat16* from, float* to, int64_t count);

}  // namespace rankwise
