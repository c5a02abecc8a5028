// The types of tensors that one launch may mix.
#pragma once

#include <cstdint>

namespace rankwise::kernels {

enum class ElementType : int32_t { bfloat16, float16, float32, float64 };

}  // namespace rankwise::kernels
