// Philox4x32-7 in vectors: as loops for any processor, and by hand for AVX-512, where compilers
// lose a factor of three to shuffles between 32 and 64 bits. The loader picks by the machine.
#include "philox.h"

#include "../../kernels/philox.h"
#include "vector_clones.h"

#if RANKWISE_X86_DISPATCH
// GCC 12 warns of its own header's _mm512_undefined_epi32 (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace rankwise {
namespace {

using kernels::Philox;

[[gnu::always_inline]] inline void in_loops(uint64_t seed, uint64_t first, int64_t blocks,
                                            uint32_t* out) {
  for (int64_t base = 0; base < blocks; base += philox_lanes) {
    uint32_t c0[philox_lanes], c1[philox_lanes], c2[philox_lanes], c3[philox_lanes];
    for (int64_t l = 0; l < philox_lanes; ++l) {
      const uint64_t counter = first + static_cast<uint64_t>(base + l);
      c0[l] = static_cast<uint32_t>(counter);
      c1[l] = static_cast<uint32_t>(counter >> 32);
      c2[l] = c3[l] = 0;
    }
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < Philox::rounds; ++round) {
      for (int64_t l = 0; l < philox_lanes; ++l) {
        const uint64_t p0 = static_cast<uint64_t>(Philox::multiplier0) * c0[l];
        const uint64_t p1 = static_cast<uint64_t>(Philox::multiplier1) * c2[l];
        c0[l] = static_cast<uint32_t>(p1 >> 32) ^ c1[l] ^ k0;
        c2[l] = static_cast<uint32_t>(p0 >> 32) ^ c3[l] ^ k1;
        c1[l] = static_cast<uint32_t>(p1);
        c3[l] = static_cast<uint32_t>(p0);
      }
      k0 += Philox::weyl0;
      k1 += Philox::weyl1;
    }
    for (int64_t l = 0; l < philox_lanes; ++l) {
      uint32_t* block = out + 4 * (base + l);
      block[0] = c0[l];
      block[1] = c1[l];
      block[2] = c2[l];
      block[3] = c3[l];
    }
  }
}

#if RANKWISE_X86_DISPATCH

RANKWISE_TARGET("default")
void numbers(uint64_t seed, uint64_t first, int64_t blocks, uint32_t* words) {
  in_loops(seed, first, blocks, words);
}

RANKWISE_TARGET("avx2")
void numbers(uint64_t seed, uint64_t first, int64_t blocks, uint32_t* words) {
  in_loops(seed, first, blocks, words);
}

// Eight blocks in four vectors of 64-bit lanes, of which the lower halves are the words: the upper
// halves hold rests of products, which the next multiplication does not read.
struct Blocks {
  __m512i c0, c1, c2, c3;
};

RANKWISE_TARGET("avx512f")
inline Blocks blocks_from(uint64_t first) {
  const __m512i counters = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)),
                                            _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  return {counters, _mm512_srli_epi64(counters, 32), _mm512_setzero_si512(),
          _mm512_setzero_si512()};
}

RANKWISE_TARGET("avx512f")
inline void round(Blocks& b, __m512i k0, __m512i k1) {
  constexpr int exclusive_or = 0x96;  // of all three operands
  const __m512i p0 = _mm512_mul_epu32(_mm512_set1_epi64(Philox::multiplier0), b.c0);
  const __m512i p1 = _mm512_mul_epu32(_mm512_set1_epi64(Philox::multiplier1), b.c2);
  b.c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), b.c1, k0, exclusive_or);
  b.c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), b.c3, k1, exclusive_or);
  b.c1 = p1;
  b.c3 = p0;
}

RANKWISE_TARGET("avx512f")
inline void store(const Blocks& b, uint32_t* words) {
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
  const auto joined = [low](__m512i a, __m512i c) RANKWISE_TARGET("avx512f") {
    return _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi64(c, 32));
  };
  const __m512i x = joined(b.c0, b.c1), y = joined(b.c2, b.c3);  // words 0, 1 and 2, 3 of each
  const __m512i even = _mm512_unpacklo_epi64(x, y), odd = _mm512_unpackhi_epi64(x, y);
  const __m512i front = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i back = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  _mm512_storeu_si512(words, _mm512_permutex2var_epi64(even, front, odd));
  _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64(even, back, odd));
}

RANKWISE_TARGET("avx512f")
void numbers(uint64_t seed, uint64_t first, int64_t blocks, uint32_t* words) {
  static_assert(philox_lanes == 16);
  for (int64_t base = 0; base < blocks; base += philox_lanes) {
    Blocks a = blocks_from(first + static_cast<uint64_t>(base));
    Blocks b = blocks_from(first + static_cast<uint64_t>(base) + 8);
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < Philox::rounds; ++i) {
      const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
      round(a, key0, key1);
      round(b, key0, key1);
      k0 += Philox::weyl0;
      k1 += Philox::weyl1;
    }
    store(a, words + 4 * base);
    store(b, words + 4 * base + 32);
  }
}

#else

void numbers(uint64_t seed, uint64_t first, int64_t blocks, uint32_t* words) {
  in_loops(seed, first, blocks, words);
}

#endif

}  // namespace

void philox_numbers(uint64_t seed, uint64_t first, int64_t blocks, uint32_t* words) {
  numbers(seed, first, blocks, words);
}

}  // namespace rankwise
