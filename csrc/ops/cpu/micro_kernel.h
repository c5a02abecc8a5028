// oneDNN's micro-kernel (at::native::cpublas::brgemm): float32 and bfloat16 products of blocks that
// lie in a core's cache, summed in float32. On the calling thread.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>

namespace rankwise {

constexpr int64_t block_rows = 64;  // of a and c in one call of the kernel

// The inner size of one call, which adds up one product after the other: runs of 192 have the
// errors of MKL's float32 sums, runs of 128 have RMS errors a sixth smaller for 2 % of the time.
// Products of bfloat16 are summed far more exactly than they are rounded.
template <typename T>
constexpr int64_t sum_run = sizeof(T) == 2 ? 4096 : 128;

// Inner sizes are rounded up to this many elements: bfloat16 products are of pairs.
template <typename T>
constexpr int64_t inner_multiple = sizeof(T) == 2 ? 2 : 1;

template <typename T>
constexpr int64_t inner_padded(int64_t inner) {
  return (inner + inner_multiple<T> - 1) / inner_multiple<T> * inner_multiple<T>;
}

// Whether this processor has the kernel for the type, and torch.backends.mkldnn is enabled.
bool micro_kernel_serves(at::ScalarType dtype);

void release_micro_kernel();

// Lives while a thread multiplies blocks of T, and then gives the kernel's state back (AMX tiles,
// which float32 products do not use): another product on this thread may change it without the
// kernel's knowledge.
template <typename T>
class MicroKernelUse {
 public:
  MicroKernelUse() = default;
  ~MicroKernelUse() {
    if constexpr (sizeof(T) == 2) release_micro_kernel();
  }
  MicroKernelUse(const MicroKernelUse&) = delete;
  MicroKernelUse& operator=(const MicroKernelUse&) = delete;
};

// c = a b, or c += a b, for a [rows, inner] and c [rows, cols] with unit column strides, b a panel
// of `cols` columns (panels.h), and inner a multiple of inner_multiple. A float32 sum is made
// of runs.
template <typename T>
void multiply_block(int64_t rows, int64_t cols, int64_t inner, const T* a, int64_t a_stride,
                    const T* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate);

// This thread's memory number `slot`, at least `count` elements of any content; the next call with
// the same slot takes it back.
enum class Slot { rows, panel, lora_panel, factor, sums, count };
void* scratch_bytes(Slot slot, size_t bytes);

template <typename T>
T* scratch(Slot slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace rankwise
