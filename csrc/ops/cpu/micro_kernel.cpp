// The kernel's availability, and products as calls of it.
#include "micro_kernel.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <vector>

namespace rankwise {
namespace {

template <typename T>
bool computes() {
  const std::array<T, 2> a = {T(3), T(5)}, b = {T(2), T(1)};
  float result = 0;
  constexpr int64_t inner = inner_multiple<T>;
  try {
    at::native::cpublas::brgemm(1, 1, inner, inner, 1, 1, /*add_C=*/false, a.data(), b.data(),
                                &result);
  } catch (const c10::Error&) {
    return false;
  }
  return result == (inner == 2 ? 11 : 6);
}

// Elsewhere oneDNN emulates the instruction.
bool has_bfloat16_products() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

// Calls body(start, size) for all of [0, total). The kernel is generated anew for each size, so
// there are few of them: `largest` and the powers of two below it.
template <typename Body>
void powers_of_two(int64_t total, int64_t largest, const Body& body) {
  int64_t start = 0;
  for (int64_t size = largest; start < total; size /= 2)
    for (; start + size <= total; start += size) body(start, size);
}

}  // namespace

bool micro_kernel_serves(at::ScalarType dtype) {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool for_float = computes<float>();
  static const bool for_bfloat16 = has_bfloat16_products() && computes<at::BFloat16>();
  return (dtype == at::kFloat && for_float) || (dtype == at::kBFloat16 && for_bfloat16);
}

void release_micro_kernel() {
  at::native::cpublas::brgemm_release();
}

template <typename T>
void multiply_block(int64_t rows, int64_t cols, int64_t inner, const T* a, int64_t a_stride,
                    const T* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  powers_of_two(rows, block_rows, [&](int64_t row, int64_t count) {
    for (int64_t k = 0; k < inner; k += sum_run<T>) {
      at::native::cpublas::brgemm(count, cols, std::min(sum_run<T>, inner - k), a_stride, b_stride,
                                  c_stride, accumulate || k > 0, a + row * a_stride + k,
                                  b + k * b_stride, c + row * c_stride);
    }
  });
}
template void multiply_block(int64_t, int64_t, int64_t, const float*, int64_t, const float*,
                             int64_t, float*, int64_t, bool);
template void multiply_block(int64_t, int64_t, int64_t, const at::BFloat16*, int64_t,
                             const at::BFloat16*, int64_t, float*, int64_t, bool);

void* scratch_bytes(Slot slot, size_t bytes) {
  struct alignas(64) Line {
    char bytes[64];
  };
  thread_local std::array<std::vector<Line>, static_cast<size_t>(Slot::count)> memory;
  std::vector<Line>& own = memory[static_cast<size_t>(slot)];
  const size_t lines = (bytes + sizeof(Line) - 1) / sizeof(Line);
  if (own.size() < lines) own.resize(lines);
  return own.data();
}

}  // namespace rankwise
