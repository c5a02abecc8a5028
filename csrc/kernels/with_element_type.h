// ElementType told apart on the device.
#pragma once

#include "device.h"
#include "element_type.h"

namespace rankwise::kernels {

// Calls run(T()) for the type.
template <typename Run>
__device__ inline void with_element_type(ElementType type, const Run& run) {
  if (type == ElementType::bfloat16) run(__nv_bfloat16());
  if (type == ElementType::float16) run(__half());
  if (type == ElementType::float32) run(float());
  if (type == ElementType::float64) run(double());
}

// The type in which numbers of T are averaged and summed.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace rankwise::kernels
