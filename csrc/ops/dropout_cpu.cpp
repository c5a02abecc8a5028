// Dropout masks on the CPU: Philox's numbers, used as they are made.
#include "dropout_cpu.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>

#include "../kernels/dropout_mask.h"
#include "checks.h"
#include "cpu_blocks.h"
#include "dropout.h"
#include "philox_cpu.h"
#include "vector_clones.h"

namespace rankwise {
namespace {

static_assert(std::endian::native == std::endian::little, "16-bit halves are read in memory order");

constexpr int64_t chunk_blocks = 8 * philox_lanes;  // 1024 numbers, 2 KiB of stack
constexpr int64_t numbers_per_block = kernels::elements_per_block;

// Calls use(offset, numbers, size) over elements [first, first + count) of the mask.
template <typename Use>
void for_numbers(uint64_t seed, int64_t first, int64_t count, const Use& use) {
  alignas(64) uint32_t words[4 * chunk_blocks];
  const auto* numbers = reinterpret_cast<const uint16_t*>(words);
  for (int64_t done = 0; done < count;) {
    const int64_t block = (first + done) / numbers_per_block;
    const int64_t skip = (first + done) % numbers_per_block;
    const int64_t size = std::min(count - done, chunk_blocks * numbers_per_block - skip);
    const int64_t blocks = (skip + size + numbers_per_block - 1) / numbers_per_block;
    philox_numbers(seed, static_cast<uint64_t>(block), blocks, words);
    use(done, numbers + skip, size);
    done += size;
  }
}

// `last` is the largest number that drops an element: 16 bits, so that 16-bit elements are compared
// and chosen in vectors of their own width.
template <typename From, typename To>
[[gnu::always_inline]] inline void select_kept(const From* src, To* dst, const uint16_t* numbers,
                                               uint16_t last, int64_t size) {
#pragma GCC ivdep  // dst may be src itself, but never overlaps otherwise
  for (int64_t j = 0; j < size; ++j) {
    if constexpr (std::is_same_v<To, uint16_t>) {
      dst[j] = src[j] & static_cast<uint16_t>(-int{numbers[j] > last});  // a choice stays scalar
    } else {
      dst[j] = numbers[j] <= last ? To(0) : static_cast<To>(src[j]);
    }
  }
}

// target_clones does not go with templates: the vector forms of the loop above.
#define RANKWISE_COPY_KEPT(From, To)                                                       \
  RANKWISE_VECTOR_CLONES void copy_kept(const From* src, To* dst, const uint16_t* numbers, \
                                        uint16_t last, int64_t size) {                     \
    select_kept(src, dst, numbers, last, size);                                            \
  }
RANKWISE_COPY_KEPT(double, double)
RANKWISE_COPY_KEPT(float, float)
RANKWISE_COPY_KEPT(uint16_t, uint16_t)  // bfloat16 and half, whose zero has no bit set
RANKWISE_COPY_KEPT(c10::BFloat16, float)
RANKWISE_COPY_KEPT(c10::Half, float)
#undef RANKWISE_COPY_KEPT

// The type whose bits a copy moves.
template <typename From, typename To>
using Moved = std::conditional_t<std::is_same_v<From, To> && sizeof(From) == 2, uint16_t, From>;

template <typename From, typename To>
void copy_block(const at::Tensor& src, const at::Tensor& dst, BlockOrigin origin, int64_t seed,
                uint32_t threshold) {
  for (int64_t i = 0; i < src.size(0); ++i) {
    using Bits = Moved<From, To>;
    using Result = std::conditional_t<std::is_same_v<From, To>, Bits, To>;
    const auto* from =
        reinterpret_cast<const Bits*>(src.const_data_ptr<From>()) + i * src.stride(0);
    auto* to = reinterpret_cast<Result*>(dst.mutable_data_ptr<To>()) + i * dst.stride(0);
    for_numbers(static_cast<uint64_t>(seed), (origin.row + i) * origin.total_cols + origin.col,
                src.size(1), [&](int64_t offset, const uint16_t* numbers, int64_t size) {
                  copy_kept(from + offset, to + offset, numbers,
                            static_cast<uint16_t>(threshold - 1), size);
                });
  }
}

at::Tensor dropout_mask_cpu(const at::Tensor& seed, int64_t rows, int64_t cols, double dropout_p,
                            at::ScalarType dtype) {
  check_dropout_p("_dropout_mask", dropout_p);
  check_seed("_dropout_mask", seed, dropout_p);
  const Dropout dropout(dropout_p);
  const at::Tensor mask = at::ones({rows, cols}, seed.options().dtype(dtype));
  if (!dropout.active()) return mask;
  const int64_t seed_value = *seed.const_data_ptr<int64_t>();
  const Split blocks(rows, std::max<int64_t>(1, scratch_elements / std::max<int64_t>(cols, 1)));
  run_blocks(blocks.count(), [&](int64_t i) {
    const at::Tensor part = blocks[i].of(mask, 0);
    dropout_copy(part, part, {blocks[i].start, 0, cols}, seed_value, dropout.threshold());
  });
  return mask;
}

}  // namespace

void dropout_copy(const at::Tensor& src, const at::Tensor& dst, BlockOrigin origin, int64_t seed,
                  uint32_t threshold) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, src.scalar_type(), "dropout_copy", [&] {
    if (dst.scalar_type() == src.scalar_type()) {
      copy_block<scalar_t, scalar_t>(src, dst, origin, seed, threshold);
    } else if constexpr (sizeof(scalar_t) == 2) {
      copy_block<scalar_t, float>(src, dst, origin, seed, threshold);
    }
  });
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_dropout_mask", &rankwise::dropout_mask_cpu);
}
