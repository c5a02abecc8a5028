// A block's shared memory: dynamic bytes that end at a closed page, and the static variables.
#pragma once

#include <cstddef>

namespace cuda_model {

class SharedMemory {
 public:
  static constexpr size_t capacity =
      99 * 1024;                       // of a block on sm_86, the least of sm_80 and later
  static constexpr int poison = 0xFF;  // NaN in every floating-point format

  static SharedMemory& instance();
  static size_t static_bytes();

  // Poisons everything, so that no block reads what another left; `bytes` of it are dynamic.
  void begin_block(size_t bytes);
  unsigned char* dynamic() const { return end_ - size_; }
  bool contains(const void* bytes, size_t size) const;

 private:
  SharedMemory();
  unsigned char* end_;
  size_t size_ = 0;
};

}  // namespace cuda_model
