// Copies of single threads (cp.async): each group happens when its thread waits for it.
#include <algorithm>
#include <cstring>
#include <vector>

#include "engine.h"
#include "shared_memory.h"

namespace cuda_model {
namespace {

struct AsyncCopy {
  void* shared;
  const void* global;
  int size, valid;
};

void perform(const AsyncCopy& copy) {
  std::memcpy(copy.shared, copy.global, copy.valid);
  std::memset(static_cast<char*>(copy.shared) + copy.valid, 0, copy.size - copy.valid);
}

using Groups = std::vector<std::vector<AsyncCopy>>;  // the last one is not committed

class AsyncCopies : public Engine {
 public:
  void begin_block(int threads) override { groups_.assign(threads, Groups(1)); }

  void end_thread(int thread) override {
    for (const auto& group : groups_[thread]) {
      if (!group.empty()) fail("the thread ends with asynchronous copies it has not waited for");
    }
  }

  Groups& of_current_thread() { return groups_[current_thread()]; }

 private:
  std::vector<Groups> groups_;
};

AsyncCopies copies;

}  // namespace

void copy_async(void* shared, const void* global, int size, int valid) {
  check_shared(shared, size, size, "an asynchronous copy");
  if (reinterpret_cast<uintptr_t>(global) % size != 0) {
    fail("an asynchronous copy of %d bytes reads from unaligned address %p", size, global);
  }
  if (valid < 0 || valid > size) fail("an asynchronous copy of %d bytes has %d valid", size, valid);
  const AsyncCopy copy{shared, global, size, valid};
  if (current_schedule().early_copies) {
    perform(copy);
  } else {
    std::memset(shared, SharedMemory::poison, size);
  }
  copies.of_current_thread().back().push_back(copy);
}

void copy_async_commit() {
  copies.of_current_thread().emplace_back();
}

void copy_async_wait(int pending_groups) {
  Groups& groups = copies.of_current_thread();
  const int finished = static_cast<int>(groups.size()) - 1 - pending_groups;
  if (finished <= 0) return;
  if (!current_schedule().early_copies) {
    for (int i = 0; i < finished; ++i) std::for_each(groups[i].begin(), groups[i].end(), perform);
  }
  groups.erase(groups.begin(), groups.begin() + finished);
}

}  // namespace cuda_model
