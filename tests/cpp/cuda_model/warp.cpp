#include "warp.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tensor_core.h"

namespace cuda_model {
namespace {

int source_lane(const ShuffleLane& lane, int self) {
  const int first = self / lane.width * lane.width;
  switch (lane.kind) {
    case Shuffle::index:
      return first + (lane.operand & (lane.width - 1));
    case Shuffle::up:
      return self - lane.operand >= first ? self - lane.operand : self;
    case Shuffle::down:
      return self + lane.operand < first + lane.width ? self + lane.operand : self;
    default:
      return (self ^ lane.operand) < first + lane.width ? self ^ lane.operand : self;
  }
}

struct BallotLane {
  bool predicate;
  uint32_t result;
};

void run_ballot(void* const* lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (int i = 0; i < warp_size; ++i) {
    if (mask >> i & 1)
      votes |= static_cast<uint32_t>(static_cast<BallotLane*>(lanes[i])->predicate) << i;
  }
  for (int i = 0; i < warp_size; ++i) {
    if (mask >> i & 1) static_cast<BallotLane*>(lanes[i])->result = votes;
  }
}

struct MatrixLane {
  const void* row;
  uint32_t* fragment;
  int count;
  bool transposed;
};

void run_load_matrices(void* const* lanes, uint32_t) {
  const auto lane = [&](int i) -> const MatrixLane& { return *static_cast<MatrixLane*>(lanes[i]); };
  for (int k = 0; k < lane(0).count; ++k) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) {
      const void* row = lane(8 * k + i).row;
      check_shared(row, 16, 16, "ldmatrix");
      std::memcpy(matrix[i], row, 16);
    }
    for (int i = 0; i < warp_size; ++i) {
      const int g = i / 4, t = 2 * (i % 4);
      const uint16_t low = lane(0).transposed ? matrix[t][g] : matrix[g][t];
      const uint16_t high = lane(0).transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      lane(i).fragment[k] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

struct ProductLane {
  float* c;
  const uint32_t *a, *b;
};

template <typename T>
void run_multiply_add(void* const* lanes, uint32_t) {
  CoreNumber a[16][16], b[8][16];
  const auto lane = [&](int i) -> const ProductLane& {
    return *static_cast<ProductLane*>(lanes[i]);
  };
  for (int i = 0; i < warp_size; ++i) {
    const int g = i / 4, t = 2 * (i % 4);
    for (int j = 0; j < 2; ++j) {
      const auto half = [&](uint32_t pair) { return core_number<T>(pair >> (16 * j) & 0xFFFF); };
      a[g][t + j] = half(lane(i).a[0]);
      a[g + 8][t + j] = half(lane(i).a[1]);
      a[g][t + 8 + j] = half(lane(i).a[2]);
      a[g + 8][t + 8 + j] = half(lane(i).a[3]);
      b[g][t + j] = half(lane(i).b[0]);
      b[g][t + 8 + j] = half(lane(i).b[1]);
    }
  }
  for (int i = 0; i < warp_size; ++i) {
    for (int element = 0; element < 4; ++element) {
      const int m = i / 4 + 8 * (element / 2), n = 2 * (i % 4) + element % 2;
      float& c = lane(i).c[element];
      c = tensor_core_sum(c, a[m], b[n]);
    }
  }
}

}  // namespace

void run_shuffle(void* const* lanes, uint32_t mask) {
  for (int i = 0; i < warp_size; ++i) {
    if (!(mask >> i & 1)) continue;
    auto& lane = *static_cast<ShuffleLane*>(lanes[i]);
    const int source = source_lane(lane, i);
    if (!(mask >> source & 1)) fail("a shuffle reads lane %d, which its mask leaves out", source);
    lane.result = static_cast<const ShuffleLane*>(lanes[source])->value;
  }
}

uint32_t ballot(uint32_t mask, bool predicate, const Site& site) {
  BallotLane lane{predicate, 0};
  warp_collective({"a ballot", run_ballot, &lane}, mask, site);
  return lane.result;
}

void load_matrices(uint32_t* fragment, int count, const void* row, bool transposed,
                   const Site& site) {
  MatrixLane lane{row, fragment, count, transposed};
  warp_collective({"ldmatrix", run_load_matrices, &lane}, full_warp, site);
}

template <typename T>
void multiply_add(float* c, const uint32_t* a, const uint32_t* b, const Site& site) {
  ProductLane lane{c, a, b};
  warp_collective({"mma", run_multiply_add<T>, &lane}, full_warp, site);
}

template void multiply_add<__nv_bfloat16>(float*, const uint32_t*, const uint32_t*, const Site&);
template void multiply_add<__half>(float*, const uint32_t*, const uint32_t*, const Site&);

}  // namespace cuda_model
