// Tensors as a safetensors file describes them.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "safetensors.h"

namespace rankwise::io {

/// The tensor type of F64, F32, F16 or BF16; float32 for all others.
at::ScalarType tensor_dtype(DType dtype);

/// Name, type and shape. Throws FileError beginning with `file` for a tensor that is undefined, not
/// in memory (tensor_memory.h), or of another type.
TensorInfo describe(const std::string& name, const at::Tensor& tensor, const std::string& file);

}  // namespace rankwise::io
