#include "tensor_copies.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "engine.h"
#include "shared_barriers.h"
#include "shared_memory.h"

namespace cuda_model {
namespace {

constexpr int box_cols = 64, element = 2, row_bytes = box_cols * element, atom = 1024;

struct Box {
  TensorMap map;
  uint32_t shared, barrier;
  int col, row;

  uint32_t bytes() const { return map.box_rows * row_bytes; }

  // use(in shared memory, in the matrix or null) for every element.
  template <typename Use>
  void each(const Use& use) const {
    for (int i = 0; i < map.box_rows; ++i) {
      for (int j = 0; j < box_cols; ++j) {
        const int64_t at_row = int64_t{row} + i, at_col = int64_t{col} + j;
        const bool inside = at_row >= 0 && at_row < map.rows && at_col >= 0 && at_col < map.cols;
        use(SharedMemory::instance().at(swizzled(shared + i * row_bytes + j * element)),
            inside ? map.data + at_row * map.stride + at_col * element : nullptr);
      }
    }
  }

  void load() const {
    each([](void* to, const void* from) {
      from ? std::memcpy(to, from, element) : std::memset(to, 0, element);
    });
    barrier_bytes(barrier, bytes());
  }

  void store() const {
    each([](const void* from, void* to) {
      if (to) std::memcpy(to, from, element);
    });
  }
};

struct Write {
  int thread;
  uint32_t first, end;
};

class TensorCopies : public Engine {
 public:
  std::vector<std::vector<std::vector<Box>>> stores;  // of a thread, by group; the last one is open
  std::vector<Box> loads;                             // under way
  std::vector<Write> writes;                          // without a fence

  void begin_block(int threads) override {
    stores.assign(threads, {{}});
    writes.clear();
  }

  void end_thread(int thread) override {
    for (const auto& group : stores[thread]) {
      if (!group.empty()) fail("the thread ends with stores of boxes it has not waited for");
    }
  }

  void end_block() override {
    if (!loads.empty()) fail("the block ends while boxes are loaded into its shared memory");
  }

  bool advance() override {
    if (loads.empty()) return false;
    const Order order = current_schedule().threads;
    const size_t i = order == Order::forwards    ? 0
                     : order == Order::backwards ? loads.size() - 1
                                                 : random_number() % loads.size();
    const Box box = loads[i];
    loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(i));
    box.load();
    return true;
  }
};

TensorCopies copies;

void check_box(const Box& box, const char* what) {
  check_shared(SharedMemory::instance().at(box.shared), box.bytes(), 16, what);
  if (box.shared % atom != 0) fail("%s at %u, which is no multiple of 1024", what, box.shared);
}

}  // namespace

void load_box(uint32_t shared, const TensorMap& map, uint32_t barrier, int col, int row) {
  const Box box{map, shared, barrier, col, row};
  check_box(box, "a box is loaded");
  if (current_schedule().early_copies) return box.load();
  std::memset(SharedMemory::instance().at(shared), SharedMemory::poison, box.bytes());
  copies.loads.push_back(box);
}

void store_box(const TensorMap& map, uint32_t shared, int col, int row) {
  const Box box{map, shared, 0, col, row};
  check_box(box, "a box is stored");
  for (const Write& write : copies.writes) {
    if (write.first < shared + box.bytes() && write.end > shared) {
      fail("a box is stored that thread %d has written without a fence", write.thread);
    }
  }
  if (current_schedule().early_copies) box.store();
  copies.stores[current_thread()].back().push_back(box);
}

void commit_stores() {
  copies.stores[current_thread()].emplace_back();
}

void wait_for_stores(int pending_groups) {
  auto& groups = copies.stores[current_thread()];
  const int finished = static_cast<int>(groups.size()) - 1 - pending_groups;
  for (int i = 0; i < finished && !current_schedule().early_copies; ++i) {
    for (const Box& box : groups[i]) box.store();
  }
  if (finished > 0) groups.erase(groups.begin(), groups.begin() + finished);
}

void note_shared_write(uint32_t address, uint32_t size) {
  copies.writes.push_back({current_thread(), address, address + size});
}

void fence_shared_writes() {
  std::erase_if(copies.writes, [](const Write& write) { return write.thread == current_thread(); });
}

}  // namespace cuda_model
