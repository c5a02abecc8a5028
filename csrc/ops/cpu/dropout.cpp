// Dropout masks on the CPU: Philox's numbers compared, and the masked copies. By hand for AVX-512,
// whose mask registers take the bits as they are.
#include "dropout.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <mutex>

#include "../../kernels/dropout_mask.h"
#include "../checks.h"
#include "../dropout.h"
#include "blocks.h"
#include "philox.h"
#include "vector_clones.h"

#if RANKWISE_X86_DISPATCH
#include <immintrin.h>
#endif

namespace rankwise {
namespace {

static_assert(std::endian::native == std::endian::little, "16-bit halves are read in memory order");

constexpr int64_t numbers_per_block = kernels::elements_per_block;
constexpr int64_t chunk_words = 16;  // of bits: 1024 numbers, 2 KiB of stack
constexpr int64_t chunk = chunk_words * kept_word;
static_assert(chunk % (philox_lanes * numbers_per_block) == 0);

[[gnu::always_inline]] inline void compare_in_loops(const uint16_t* numbers, uint16_t last,
                                                    int64_t words, uint64_t* bits) {
  for (int64_t w = 0; w < words; ++w) {
    uint64_t word = 0;
    for (int64_t j = 0; j < kept_word; ++j)
      word |= static_cast<uint64_t>(numbers[w * kept_word + j] > last) << j;
    bits[w] = word;
  }
}

template <typename From, typename To>
[[gnu::always_inline]] inline void copy_in_loops(Rows<const From> from, KeptBits kept, int64_t rows,
                                                 int64_t cols, Rows<To> to) {
  for (int64_t i = 0; i < rows; ++i) {
    const From* const src = from[i];
    To* const dst = to[i];
    const uint64_t* const bits = kept[i];
    for (int64_t j = 0; j < cols; ++j)
      dst[j] = kept_from(bits, j) & 1 ? static_cast<To>(src[j]) : To(0);
  }
}

#if RANKWISE_X86_DISPATCH

const bool has_avx512bw = __builtin_cpu_supports("avx512bw") != 0;

RANKWISE_TARGET("avx512bw")
void compare_in_vectors(const uint16_t* numbers, uint16_t last, int64_t words, uint64_t* bits) {
  const __m512i bound = _mm512_set1_epi16(static_cast<int16_t>(last));
  for (int64_t w = 0; w < words; ++w, numbers += kept_word) {
    const uint64_t low = _mm512_cmpgt_epu16_mask(_mm512_loadu_si512(numbers), bound);
    const uint64_t high = _mm512_cmpgt_epu16_mask(_mm512_loadu_si512(numbers + 32), bound);
    bits[w] = low | high << 32;
  }
}

RANKWISE_TARGET("avx512bw")
inline void copy_row(const float* src, float* dst, const uint64_t* bits, int64_t count) {
  int64_t j = 0;
  for (; j + 16 <= count; j += 16)
    _mm512_storeu_ps(dst + j,
                     _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept_from(bits, j)), src + j));
  if (j == count) return;
  const auto rest = static_cast<__mmask16>((1U << (count - j)) - 1);
  const auto kept = static_cast<__mmask16>(kept_from(bits, j) & rest);
  _mm512_mask_storeu_ps(dst + j, rest, _mm512_maskz_loadu_ps(kept, src + j));
}

RANKWISE_TARGET("avx512bw")
inline void copy_row(const uint16_t* src, uint16_t* dst, const uint64_t* bits, int64_t count) {
  int64_t j = 0;
  for (; j + 32 <= count; j += 32)
    _mm512_storeu_si512(
        dst + j, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(kept_from(bits, j)), src + j));
  if (j == count) return;
  const auto rest = static_cast<__mmask32>((uint64_t{1} << (count - j)) - 1);
  const auto kept = static_cast<__mmask32>(kept_from(bits, j) & rest);
  _mm512_mask_storeu_epi16(dst + j, rest, _mm512_maskz_loadu_epi16(kept, src + j));
}

template <typename T>
RANKWISE_TARGET("avx512bw")
void copy_in_vectors(Rows<const T> from, KeptBits kept, int64_t rows, int64_t cols, Rows<T> to) {
  for (int64_t i = 0; i < rows; ++i) copy_row(from[i], to[i], kept[i], cols);
}

#else

constexpr bool has_avx512bw = false;
void compare_in_vectors(const uint16_t*, uint16_t, int64_t, uint64_t*) {}
template <typename T>
void copy_in_vectors(Rows<const T>, KeptBits, int64_t, int64_t, Rows<T>) {}

#endif

// bits[w] bit j: numbers[64 w + j] > last.
void compare(const uint16_t* numbers, uint16_t last, int64_t words, uint64_t* bits) {
  if (has_avx512bw) return compare_in_vectors(numbers, last, words, bits);
  compare_in_loops(numbers, last, words, bits);
}

void copy(Rows<const float> from, KeptBits kept, int64_t rows, int64_t cols, Rows<float> to) {
  if (has_avx512bw) return copy_in_vectors(from, kept, rows, cols, to);
  copy_in_loops(from, kept, rows, cols, to);
}

void copy(Rows<const uint16_t> from, KeptBits kept, int64_t rows, int64_t cols, Rows<uint16_t> to) {
  if (has_avx512bw) return copy_in_vectors(from, kept, rows, cols, to);
  copy_in_loops(from, kept, rows, cols, to);
}

// target_clones does not go with templates: the vector forms of the loop above.
#define RANKWISE_COPY(From, To)                                                        \
  RANKWISE_VECTOR_CLONES void copy(Rows<const From> from, KeptBits kept, int64_t rows, \
                                   int64_t cols, Rows<To> to) {                        \
    copy_in_loops(from, kept, rows, cols, to);                                         \
  }
RANKWISE_COPY(double, double)
RANKWISE_COPY(at::BFloat16, float)
RANKWISE_COPY(at::Half, float)
#undef RANKWISE_COPY

// The bits of one type of 16-bit numbers are as good as the other's: zero has none.
template <typename From, typename To>
using Moved = std::conditional_t<std::is_same_v<From, To> && sizeof(From) == 2, uint16_t, From>;

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

// Of elements first, first + 1, ...: the bits behind the last one have any value.
void draw_run(int64_t seed, uint32_t threshold, int64_t first, int64_t count, uint64_t* bits) {
  // Numbers before `first` of its block are passed over.
  alignas(64) uint32_t words[(chunk + philox_lanes * numbers_per_block) / 2];
  const auto* const numbers = reinterpret_cast<const uint16_t*>(words);
  const int64_t skip = first % numbers_per_block;
  for (int64_t done = 0; done < count; done += chunk) {
    const int64_t size = std::min(count - done, chunk);
    philox_numbers(static_cast<uint64_t>(seed),
                   static_cast<uint64_t>((first + done) / numbers_per_block),
                   (skip + size + numbers_per_block - 1) / numbers_per_block, words);
    compare(numbers + skip, static_cast<uint16_t>(threshold - 1), kept_words(size),
            bits + done / kept_word);
  }
}

}  // namespace

template <typename From, typename To>
void copy_kept(Rows<const From> from, KeptBits kept, int64_t rows, int64_t cols, Rows<To> to) {
  using Bits = Moved<From, To>;
  using Result = std::conditional_t<std::is_same_v<From, To>, Bits, To>;
  copy(Rows<const Bits>{reinterpret_cast<const Bits*>(from.data), from.stride}, kept, rows, cols,
       Rows<Result>{reinterpret_cast<Result*>(to.data), to.stride});
}
template void copy_kept(Rows<const float>, KeptBits, int64_t, int64_t, Rows<float>);
template void copy_kept(Rows<const at::BFloat16>, KeptBits, int64_t, int64_t, Rows<at::BFloat16>);
template void copy_kept(Rows<const at::BFloat16>, KeptBits, int64_t, int64_t, Rows<float>);

at::Tensor draw_seed_cpu(const Dropout& dropout) {
  const at::Tensor seed = at::detail::empty_cpu({dropout.active() ? 1 : 0}, at::kLong);
  if (!dropout.active()) return seed;
  auto* const generator =
      at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  const std::lock_guard lock(generator->mutex_);
  constexpr uint64_t range = std::numeric_limits<int64_t>::max();
  *seed.mutable_data_ptr<int64_t>() = static_cast<int64_t>(generator->random64() % range);
  return seed;
}

void draw_kept(int64_t seed, uint32_t threshold, BlockOrigin origin, int64_t rows, int64_t cols,
               Rows<uint64_t> bits) {
  const int64_t first = origin.row * origin.total_cols + origin.col;
  if (cols == origin.total_cols && cols == bits.stride * kept_word)  // one after the other
    return draw_run(seed, threshold, first, rows * cols, bits.data);
  for (int64_t i = 0; i < rows; ++i)
    draw_run(seed, threshold, first + i * origin.total_cols, cols, bits[i]);
}

void dropout_copy(const at::Tensor& src, const at::Tensor& dst, BlockOrigin origin, int64_t seed,
                  uint32_t threshold) {
  const int64_t rows = src.size(0), cols = src.size(1), words = kept_words(cols);
  std::vector<uint64_t> memory(rows * words);
  const Rows<uint64_t> bits{memory.data(), words};
  draw_kept(seed, threshold, origin, rows, cols, bits);
  const auto copy_to = [&]<typename From, typename To>() -> void {
    copy_kept<From, To>({src.const_data_ptr<From>(), src.stride(0)}, bits, rows, cols,
                        {dst.mutable_data_ptr<To>(), dst.stride(0)});
  };
  const auto copy_rows = [&]<typename From>() -> void {
    if (dst.scalar_type() == src.scalar_type()) {
      copy_to.template operator()<From, From>();
    } else if constexpr (sizeof(From) == 2) {
      copy_to.template operator()<From, float>();
    }
  };
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, src.scalar_type(), "dropout_copy",
                                  [&] { copy_rows.template operator()<scalar_t>(); });
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_dropout_mask", &rankwise::dropout_mask_cpu);
}
