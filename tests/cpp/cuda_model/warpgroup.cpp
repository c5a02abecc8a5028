#include "warpgroup.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "engine.h"
#include "shared_memory.h"
#include "tensor_copies.h"
#include "tensor_core.h"

namespace cuda_model {
namespace {

constexpr int depth = 16, warp_rows = 16, group_warps = 4, longest = 256;

uint32_t field(uint64_t descriptor, int bit) {
  return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4;
}

// Element (i, k) of an operand, i along the rows of the left or the columns of the right.
uint32_t element(uint64_t descriptor, bool by_row, int i, int k) {
  const uint32_t start = field(descriptor, 0), leading = field(descriptor, 16),
                 stride = field(descriptor, 32);
  const uint32_t offset = by_row ? i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride
                                 : i % 8 * 128 + i / 8 * stride + k * 2;
  const unsigned char* at = SharedMemory::instance().at(swizzled(start + offset));
  check_shared(at, 2, 2, "wgmma");
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return bits;
}

struct Lanes {
  std::array<float*, warp_size> sums;
};

struct Product {
  GroupProduct of;
  Lanes lanes;
  int warp;
  void (*run)(const Product&);
};

// The sums of a lane while products are under way: `values` instead of the lane's own.
struct Held {
  std::vector<float> values;
  int products = 0;
};

struct Warp {
  bool fenced = false;
  std::vector<std::vector<Product>> groups;  // the last one is open
  std::map<float*, Held> held;
};

class Warpgroups : public Engine {
 public:
  std::vector<Warp> warps;

  void begin_block(int threads) override {
    warps.assign((threads + warp_size - 1) / warp_size, Warp{false, {{}}, {}});
  }

  void end_thread(int thread) override {
    if (!warps[thread / warp_size].held.empty()) fail("the thread ends with products under way");
  }

  Warp& current() { return warps[current_thread() / warp_size]; }
};

Warpgroups warpgroups;

template <typename T>
void run_product(const Product& p) {
  static CoreNumber left[warp_rows][depth], right[longest][depth];
  for (int k = 0; k < depth; ++k) {
    for (int i = 0; i < warp_rows; ++i) {
      left[i][k] = core_number<T>(
          element(p.of.left, p.of.left_by_row, p.warp % group_warps * warp_rows + i, k));
    }
    for (int j = 0; j < p.of.cols; ++j) {
      right[j][k] = core_number<T>(element(p.of.right, p.of.right_by_row, j, k));
    }
  }
  Warp& warp = warpgroups.warps[p.warp];
  for (int lane = 0; lane < warp_size; ++lane) {
    Held& held = warp.held[p.lanes.sums[lane]];
    for (int i = 0; i < p.of.cols / 2; ++i) {
      const int row = lane / 4 + 8 * (i / 2 % 2), col = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float& sum = held.values[i];
      sum = tensor_core_sum(p.of.keep ? sum : 0.0f, left[row], right[col]);
    }
    if (--held.products > 0) continue;
    std::memcpy(p.lanes.sums[lane], held.values.data(), held.values.size() * sizeof(float));
    warp.held.erase(p.lanes.sums[lane]);
  }
}

void hold(Warp& warp, float* sums, int count) {
  Held& held = warp.held[sums];
  if (held.products++ > 0) return;
  held.values.assign(sums, sums + count);
  std::fill(sums, sums + count, std::numeric_limits<float>::quiet_NaN());
}

template <typename T>
void start_product(void* const* data, uint32_t) {
  const auto& of = *static_cast<GroupProduct*>(data[0]);
  Product product{of, {}, current_thread() / warp_size, run_product<T>};
  Warp& warp = warpgroups.current();
  if (!warp.fenced) fail("wgmma without wgmma.fence after its sums may have been touched");
  for (const uint64_t operand : {of.left, of.right}) {
    if (operand >> 62 != 1 || (operand >> 49 & 7) != 0) fail("wgmma: not the 128-byte swizzle");
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    const auto& its = *static_cast<GroupProduct*>(data[lane]);
    if (its.left != of.left || its.right != of.right || its.keep != of.keep) {
      fail("wgmma: lanes 0 and %d give different operands", lane);
    }
    product.lanes.sums[lane] = its.sums;
    hold(warp, its.sums, of.cols / 2);
  }
  if (current_schedule().early_copies) return product.run(product);
  warp.groups.back().push_back(product);
}

void fence(void* const*, uint32_t) {
  warpgroups.current().fenced = true;
}

void commit(void* const*, uint32_t) {
  warpgroups.current().groups.emplace_back();
}

void wait(void* const* data, uint32_t) {
  Warp& warp = warpgroups.current();
  warp.fenced = false;
  const int finished = static_cast<int>(warp.groups.size()) - 1 - *static_cast<int*>(data[0]);
  for (int i = 0; i < finished; ++i) {
    for (const Product& product : warp.groups[i]) product.run(product);
  }
  if (finished > 0) warp.groups.erase(warp.groups.begin(), warp.groups.begin() + finished);
}

struct StoredRow {
  uint32_t row;
  const uint32_t* fragment;
};

void run_store_matrices(void* const* data, uint32_t) {
  const auto lane = [&](int i) { return *static_cast<StoredRow*>(data[i]); };
  for (int i = 0; i < warp_size; ++i) {
    check_shared(SharedMemory::instance().at(lane(i).row), 16, 16, "stmatrix");
    for (int j = 0; j < 4; ++j) {
      const uint32_t word = lane(i % 8 * 4 + j).fragment[i / 8];
      std::memcpy(SharedMemory::instance().at(lane(i).row + 4 * j), &word, 4);
    }
  }
}

}  // namespace

void products_fence(const Site& site) {
  warp_collective({"wgmma.fence", fence, nullptr}, full_warp, site);
}

template <typename T>
void multiply_group(const GroupProduct& product, const Site& site) {
  GroupProduct own = product;
  warp_collective({"wgmma", start_product<T>, &own}, full_warp, site);
}

template void multiply_group<__nv_bfloat16>(const GroupProduct&, const Site&);
template void multiply_group<__half>(const GroupProduct&, const Site&);

void products_commit(const Site& site) {
  warp_collective({"wgmma.commit_group", commit, nullptr}, full_warp, site);
}

void products_wait(int pending_groups, const Site& site) {
  warp_collective({"wgmma.wait_group", wait, &pending_groups}, full_warp, site);
}

void store_matrices(uint32_t row, const uint32_t* fragment, const Site& site) {
  StoredRow lane{row, fragment};
  warp_collective({"stmatrix", run_store_matrices, &lane}, full_warp, site);
  note_shared_write(row, 16);
}

}  // namespace cuda_model
