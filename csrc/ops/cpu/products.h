// Products of one block on the calling thread. A long float32 or float64 sum is made of runs, which
// keeps its rounding errors small; a 16-bit one is rounded once.
#pragma once

#include <ATen/core/Tensor.h>

#include "blocks.h"

namespace rankwise {

constexpr int64_t base_run = 512;    // 3 to 5 % slower than one sum of 4096
constexpr int64_t tokens_run = 128;  // nearly free where the rank is small

// The inner size of a product in the pieces it is summed in.
Split runs(const at::Tensor& out, int64_t inner, int64_t run);

// out = alpha * a b + add, for out of any content. `add` may be out itself, a row, or undefined.
void multiply_into(at::Tensor out, const at::Tensor& a, const at::Tensor& b, double alpha,
                   const at::Tensor& add = {});

}  // namespace rankwise
