#include "tensor_core.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace cuda_model {
namespace {

constexpr int depth = 16, last_place = 23;              // of float32, below its first bit
constexpr int of_zero = -10000, of_infinity = 1000000;  // beyond the exponents of all others

TensorCore core = sm_80_tensor_core;

float number(uint32_t half, __nv_bfloat16) {
  const uint32_t bits = half << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float number(uint32_t half, __half) {
  __half_raw raw;
  raw.x = static_cast<uint16_t>(half);
  return __half2float(__half(raw));
}

// The exponent of the type's least normal number.
constexpr int least_exponent(__nv_bfloat16) {
  return -126;
}

constexpr int least_exponent(__half) {
  return -14;
}

double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// Beyond the last binade of float32 lies infinity.
float cut_to_float(double value) {
  if (std::fabs(value) >= 0x1p128) return static_cast<float>(std::copysign(HUGE_VAL, value));
  const auto nearest = static_cast<float>(value);
  if (std::fabs(static_cast<double>(nearest)) <= std::fabs(value)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

float add_products(float c, const CoreNumber* a, const CoreNumber* b, int count) {
  int largest = 2 * of_zero;
  for (int k = 0; k < count; ++k) largest = std::max(largest, a[k].exponent + b[k].exponent);
  if (largest < of_zero / 2) return c;
  const CoreNumber sum(c, std::numeric_limits<float>::min_exponent - 1);
  largest = std::max(largest, sum.exponent);
  if (largest > of_infinity / 2) {
    double infinite = sum.value;
    for (int k = 0; k < count; ++k) infinite += a[k].value * b[k].value;
    return static_cast<float>(infinite);
  }
  // In units of the last place that is kept: conversions to integers cut toward zero.
  const double units = power_of_two(last_place + core.extra_bits - largest);
  auto total = static_cast<int64_t>(sum.value * units);
  for (int k = 0; k < count; ++k) {
    total += static_cast<int64_t>(a[k].value * b[k].value * units);
  }
  return cut_to_float(static_cast<double>(total) *
                      power_of_two(largest - last_place - core.extra_bits));
}

}  // namespace

void set_tensor_core(const TensorCore& next) {
  core = next;
}

CoreNumber::CoreNumber(float number, int least_exponent) : value(number) {
  const auto field = static_cast<int>(std::bit_cast<uint32_t>(number) >> 23 & 0xFF);
  exponent = field == 0xFF ? of_infinity
             : number == 0 ? of_zero
                           : std::max(field - 127, least_exponent);
}

template <typename T>
CoreNumber core_number(uint32_t bits) {
  return CoreNumber(number(bits, T()), least_exponent(T()));
}

template CoreNumber core_number<__nv_bfloat16>(uint32_t);
template CoreNumber core_number<__half>(uint32_t);

float tensor_core_sum(float c, const CoreNumber* a, const CoreNumber* b) {
  for (int k = 0; k < depth; k += core.products) {
    c = add_products(c, a + k, b + k, core.products);
  }
  return c;
}

}  // namespace cuda_model
