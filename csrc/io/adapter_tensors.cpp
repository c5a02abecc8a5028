// Tensors as a safetensors file describes them.
#include "adapter_tensors.h"

#include <rankwise/file_error.h>
#include <rankwise/tensor_memory.h>

#include <array>
#include <utility>

#include "message_text.h"

namespace rankwise::io {
namespace {

constexpr std::array<std::pair<DType, at::ScalarType>, 4> dtype_pairs = {{
    {DType::f64, at::kDouble},
    {DType::f32, at::kFloat},
    {DType::f16, at::kHalf},
    {DType::bf16, at::kBFloat16},
}};

}  // namespace

at::ScalarType tensor_dtype(DType dtype) {
  for (const auto& [file_dtype, tensor_dtype] : dtype_pairs) {
    if (file_dtype == dtype) return tensor_dtype;
  }
  return at::kFloat;
}

TensorInfo describe(const std::string& name, const at::Tensor& tensor, const std::string& file) {
  const auto fail = [&](const std::string& wanted, const std::string& got) {
    throw FileError(file + ": tensor " + in_quotes(name) + " must be " + wanted + ", got " + got);
  };
  if (!tensor.defined()) fail("defined", "an undefined tensor");
  const std::string kind = kind_without_memory(tensor);
  if (!kind.empty()) fail("dense, with data", kind + "; put a plain tensor in its place");
  for (const auto& [file_dtype, tensor_dtype] : dtype_pairs) {
    if (tensor_dtype != tensor.scalar_type()) continue;
    return {.name = name, .dtype = file_dtype, .shape = tensor.sizes().vec()};
  }
  fail("float64, float32, float16 or bfloat16", c10::toString(tensor.scalar_type()));
  return {};
}

}  // namespace rankwise::io
