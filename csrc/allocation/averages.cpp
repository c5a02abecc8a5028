// All averages of a type and device lie in one allocation, in the order in which a step walks over
// them: on the CPU in huge pages, because a step is bound by memory and address translation.
#include "averages.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rankwise {
namespace {

constexpr int64_t huge_page = int64_t{2} << 20;
constexpr int64_t alignment = 64;  // bytes; a vector register's

int64_t rounded_up(int64_t size, int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

// Zeros in memory of their own, in huge pages where the system has them to give. Not from malloc,
// whose memory has the pages that its earlier use gave it.
at::Tensor zeros_in_huge_pages(int64_t count, const at::TensorOptions& options) {
#ifdef __linux__
  const auto bytes = static_cast<size_t>(count) * options.dtype().itemsize() + huge_page;
  void* const mapped =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped != MAP_FAILED) {
    madvise(mapped, bytes, MADV_HUGEPAGE);  // advice: without it the pages are small, not wrong
    const auto start = rounded_up(reinterpret_cast<int64_t>(mapped), huge_page);
    return at::from_blob(
        reinterpret_cast<void*>(start), {count}, [=](void*) { munmap(mapped, bytes); }, options);
  }
#endif
  return at::zeros({count}, options);
}

at::TensorOptions average_options(const at::Tensor& factor) {
  return factor.options().dtype(at::toOpMathType(factor.scalar_type())).requires_grad(false);
}

// Hands out consecutive parts of one allocation.
class Arena {
 public:
  Arena(int64_t count, const at::TensorOptions& options)
      : memory_(options.device().is_cpu() &&
                        count * static_cast<int64_t>(options.dtype().itemsize()) >= huge_page
                    ? zeros_in_huge_pages(count, options)
                    : at::zeros({count}, options)) {}

  static int64_t padded(const at::Tensor& factor) { return rounded_up(factor.numel(), alignment); }

  at::Tensor next(const at::Tensor& factor) {
    const at::Tensor part = memory_.narrow(0, used_, factor.numel()).view(factor.sizes());
    used_ += padded(factor);
    return part;
  }

 private:
  at::Tensor memory_;
  int64_t used_ = 0;
};

}  // namespace

Averages zero_averages(at::TensorList factors) {
  Averages averages{std::vector<at::Tensor>(factors.size()),
                    std::vector<at::Tensor>(factors.size())};
  for (size_t first = 0; first < factors.size(); ++first) {
    if (averages.sensitivity[first].defined()) continue;
    const at::TensorOptions options = average_options(factors[first]);
    const auto alike = [&](const at::Tensor& factor) {
      return factor.device() == options.device() &&
             at::toOpMathType(factor.scalar_type()) == options.dtype();
    };
    int64_t count = 0;
    for (const at::Tensor& factor : factors)
      if (alike(factor)) count += 2 * Arena::padded(factor);
    Arena arena(count, options);
    for (size_t i = first; i < factors.size(); ++i) {
      if (!alike(factors[i])) continue;
      averages.sensitivity[i] = arena.next(factors[i]);
      averages.uncertainty[i] = arena.next(factors[i]);
    }
  }
  return averages;
}

}  // namespace rankwise
