// A block's shared memory: dynamic bytes that end at a closed page, and the static variables.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_model {

class SharedMemory {
 public:
  static constexpr int poison = 0xFF;  // NaN in every floating-point format

  static SharedMemory& instance();
  static size_t static_bytes();

  // Poisons everything, so that no block reads what another left; `bytes` of it are dynamic.
  void begin_block(size_t bytes);
  unsigned char* dynamic() const { return end_ - size_; }
  bool contains(const void* bytes, size_t size) const;

  // The 32-bit addresses that instructions of sm_90 take, of dynamic memory.
  uint32_t address(const void* bytes) const;
  unsigned char* at(uint32_t address) const;

 private:
  SharedMemory();
  unsigned char *first_, *end_;
  size_t size_ = 0;
};

}  // namespace cuda_model
