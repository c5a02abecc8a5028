// Elements of every type that the allocator's kernels take, as doubles.
#pragma once

#include <cuda_model/device.h>
#include <kernels/with_element_type.h>

namespace rankwise::kernels {

template <typename T>
constexpr ElementType element_type_of = std::is_same_v<T, double>          ? ElementType::float64
                                        : std::is_same_v<T, float>         ? ElementType::float32
                                        : std::is_same_v<T, __nv_bfloat16> ? ElementType::bfloat16
                                                                           : ElementType::float16;

template <typename T>
T element(double value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return T(static_cast<float>(value));
  }
}

template <typename T>
double number(T value) {
  return static_cast<double>(static_cast<Wide<T>>(value));
}

}  // namespace rankwise::kernels
