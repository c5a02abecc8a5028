#include "shared_memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "grid.h"

// The section that __shared__ variables are put into (device.h); absent where there is none.
extern "C" __attribute__((weak)) unsigned char __start_cuda_model_shared[];
extern "C" __attribute__((weak)) unsigned char __stop_cuda_model_shared[];

namespace cuda_model {

SharedMemory::SharedMemory() {
  constexpr size_t page = 4096, bytes = (sm_90_shared + page - 1) / page * page;
  void* memory = mmap(nullptr, bytes + 2 * page, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  first_ = static_cast<unsigned char*>(memory) + page;
  if (memory == MAP_FAILED || mprotect(first_, bytes, PROT_READ | PROT_WRITE) != 0) {
    std::perror("cuda_model: shared memory");
    std::abort();
  }
  end_ = first_ + bytes;
}

SharedMemory& SharedMemory::instance() {
  static SharedMemory memory;
  return memory;
}

size_t SharedMemory::static_bytes() {
  return __stop_cuda_model_shared - __start_cuda_model_shared;
}

void SharedMemory::begin_block(size_t bytes) {
  size_ = (bytes + 15) / 16 * 16;
  std::memset(dynamic(), poison, size_);
  if (static_bytes() > 0) std::memset(__start_cuda_model_shared, poison, static_bytes());
}

bool SharedMemory::contains(const void* bytes, size_t size) const {
  const auto* first = static_cast<const unsigned char*>(bytes);
  const bool in_dynamic = first >= dynamic() && first + size <= end_;
  return in_dynamic ||
         (first >= __start_cuda_model_shared && first + size <= __stop_cuda_model_shared);
}

uint32_t SharedMemory::address(const void* bytes) const {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(bytes) - first_);
}

unsigned char* SharedMemory::at(uint32_t address) const {
  return first_ + address;
}

unsigned char* dynamic_shared() {
  return SharedMemory::instance().dynamic();
}

void check_shared(const void* bytes, size_t size, size_t alignment, const char* what) {
  if (!SharedMemory::instance().contains(bytes, size)) {
    fail("%s touches %zu bytes at %p, outside the block's shared memory", what, size, bytes);
  }
  if (reinterpret_cast<uintptr_t>(bytes) % alignment != 0) {
    fail("%s uses shared address %p, which is no multiple of %zu", what, bytes, alignment);
  }
}

}  // namespace cuda_model
