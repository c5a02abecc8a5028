// How tensor cores add: not as IEEE sums.
//
// One step takes the running sum c and the exact products of a group along k. Every term is cut
// toward zero `extra_bits` below float32's last place of the largest one, the place of a product
// being counted from the sum of its factors' exponents; the cut terms are added exactly, and the
// result is cut toward zero to float32. So a long sum loses at every step, always in one direction.
// Source: Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores", arXiv 2512.07004.
#pragma once

#include <cstdint>

namespace cuda_model {

struct TensorCore {
  int products;    // of a step
  int extra_bits;  // below float32's last place
};

constexpr TensorCore sm_80_tensor_core{8, 1};
constexpr TensorCore sm_90_tensor_core{16, 2};

// Holds for all launches until the next call; at first it is sm_80's, the less exact one.
void set_tensor_core(const TensorCore& core);

struct CoreNumber {
  CoreNumber() = default;
  // least_exponent: that of the least normal number of the number's format. Smaller numbers have it
  // too.
  CoreNumber(float number, int least_exponent);

  double value = 0;
  int exponent = 0;
};

// Of the bits of T, __nv_bfloat16 or __half.
template <typename T>
CoreNumber core_number(uint32_t bits);

// c + a[0] b[0] + ... + a[15] b[15], step by step.
float tensor_core_sum(float c, const CoreNumber* a, const CoreNumber* b);

}  // namespace cuda_model
