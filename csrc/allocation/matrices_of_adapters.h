// Small linear algebra over many adapters, the same on every number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdint>

namespace rankwise {

// A copy of its own in float64 on the CPU.
inline at::Tensor doubles(const at::Tensor& tensor) {
  return tensor.detach().to(at::kCPU, at::kDouble).contiguous();
}

// Calls job(0 .. count - 1), always within a parallel region where there are threads: linear
// algebra takes one thread in it, so that results do not depend on how many there are.
template <class Job>
void for_each_matrix(size_t count, const Job& job) {
  const auto items = std::max<int64_t>(static_cast<int64_t>(count), 2);
  at::parallel_for(0, items, 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad;
    for (int64_t i = first; i < std::min<int64_t>(last, static_cast<int64_t>(count)); ++i)
      job(static_cast<size_t>(i));
  });
}

}  // namespace rankwise
