// Operations of a whole warp: shuffles, votes, and the tensor core's loads and products with the
// fragment layouts of the PTX ISA ("Matrix multiply-accumulate operation using mma instruction",
// "ldmatrix").
#pragma once

#include <cstring>

#include "grid.h"

namespace cuda_model {

enum class Shuffle { index, up, down, exclusive_or };

struct ShuffleLane {
  Shuffle kind;
  uint64_t value, result;
  int operand, width;
};
void run_shuffle(void* const* lanes, uint32_t mask);

template <typename T>
T shuffle(Shuffle kind, uint32_t mask, T value, int operand, int width, const Site& site) {
  static_assert(sizeof(T) <= 8);
  ShuffleLane lane{kind, 0, 0, operand, width};
  std::memcpy(&lane.value, &value, sizeof(T));
  warp_collective({"a shuffle", run_shuffle, &lane}, mask, site);
  std::memcpy(&value, &lane.result, sizeof(T));
  return value;
}

uint32_t ballot(uint32_t mask, bool predicate, const Site& site);

// `count` matrices of 8 x 8 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
void load_matrices(uint32_t* fragment, int count, const void* row, bool transposed,
                   const Site& site);

// c += a b for a [16, 16], b [16, 8] of T and c [16, 8] in float32; T is __nv_bfloat16 or __half.
template <typename T>
void multiply_add(float* c, const uint32_t* a, const uint32_t* b, const Site& site);

}  // namespace cuda_model
