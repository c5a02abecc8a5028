// The moving averages' memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace rankwise {

struct Averages {
  std::vector<at::Tensor> sensitivity, uncertainty;  // of A, B, E of each adapter
};

// Zeros of the factors' shapes, on their devices, in float32 or the factors' wider type.
Averages zero_averages(at::TensorList factors);

}  // namespace rankwise
