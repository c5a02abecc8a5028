#include "device_memory.h"

#include <signal.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "grid.h"

namespace cuda_model {
namespace {

constexpr size_t page = 4096, alignment = 16;
constexpr unsigned char poison = 0xFF, margin = 0xFE;  // a huge number or NaN

size_t round_up(size_t value, size_t step) {
  return (value + step - 1) / step * step;
}

void report_fault(int, siginfo_t* info, void*) {
  fail("a load or store at %p, outside device memory", info->si_addr);
}

// On a stack of its own: a fiber's may be the one that overflowed.
void report_faults() {
  static char stack[64 * 1024];
  stack_t alternative{};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof(stack);
  sigaltstack(&alternative, nullptr);
  struct sigaction action {};
  action.sa_sigaction = report_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
}

}  // namespace

DeviceBytes::DeviceBytes(size_t size, size_t offset, Flush flush) : size_(size) {
  static const bool reported = (report_faults(), true);
  (void)reported;
  page_bytes_ = round_up(size + alignment, page);
  void* memory = mmap(nullptr, page_bytes_ + 2 * page, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  pages_ = static_cast<unsigned char*>(memory) + page;
  if (memory == MAP_FAILED || mprotect(pages_, page_bytes_, PROT_READ | PROT_WRITE) != 0) {
    std::perror("cuda_model: device memory");
    std::abort();
  }
  data_ = flush == Flush::start
              ? pages_
              : pages_ + page_bytes_ - round_up(offset % alignment + size, alignment) +
                    offset % alignment;
  std::memset(pages_, margin, page_bytes_);
  std::memset(data_, poison, size);
}

DeviceBytes::DeviceBytes(DeviceBytes&& other) noexcept
    : pages_(std::exchange(other.pages_, nullptr)),
      data_(other.data_),
      page_bytes_(other.page_bytes_),
      size_(other.size_) {}

DeviceBytes::~DeviceBytes() {
  if (!pages_) return;
  check_margins();
  munmap(pages_ - page, page_bytes_ + 2 * page);
}

void DeviceBytes::check_margins() const {
  for (const unsigned char* at = pages_; at < pages_ + page_bytes_; ++at) {
    const bool inside = at >= data_ && at < data_ + size_;
    if (!inside && *at != margin) {
      fail("a store %td bytes from the start of device memory of %zu bytes", at - data_, size_);
    }
  }
}

}  // namespace cuda_model
