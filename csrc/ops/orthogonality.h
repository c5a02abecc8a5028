// What the implementations of the orthogonality penalty share.
#pragma once

#include <ATen/core/Tensor.h>

namespace rankwise {

// Throws unless shapes, dtypes and ranks fit (the contract stands in ops.h).
void check_orthogonality(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks);

}  // namespace rankwise
