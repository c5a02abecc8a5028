// Philox4x32-7, the counter-based generator of Salmon, Moraes, Dror and Shaw (SC 2011), the same
// arithmetic on host and device. Known answers: tests/cpp/kernels/philox_test.cpp.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace rankwise::kernels {

struct Philox {
  static constexpr int rounds = 7;
  static constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;
  uint32_t word[4];
};

// All 64 bits of a product. nvcc makes more than one instruction of the plain expression.
RANKWISE_HOST_DEVICE inline uint64_t multiply_wide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// The four output words for a 64-bit counter and a 64-bit key (low word first; the counter's high
// half of 128 bits is zero unless given).
RANKWISE_HOST_DEVICE inline Philox philox(uint64_t counter, uint64_t key,
                                          uint64_t counter_high = 0) {
  auto c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  auto c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < Philox::rounds; ++round) {
    const uint64_t p0 = multiply_wide(Philox::multiplier0, c0);
    const uint64_t p1 = multiply_wide(Philox::multiplier1, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += Philox::weyl0;
    k1 += Philox::weyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace rankwise::kernels
