// The large product of a layer with the LoRA term in its sums, for sm_90a: launchers over raw
// pointers, no torch.
//
//   out = left right + tail_left tail_right + bias
//
//   forward   y  = x W^T + (s) B^T + bias:  right and tail_right by column, W [cols, depth] and
//                                           B [cols, rank] as they lie in memory
//   gradient  dx = dy W + mask(dh A):       by row, W [depth, cols] and A [rank, cols]
//
// One dtype of 16 bits; products are exact, sums float32 on the tensor core, the result is rounded
// once. The order of sums depends on the shape alone: the same input gives the same bits.
//
// All matrices are row-major with rows `stride` elements apart, device pointers and strides
// multiples of 16 bytes, cols and depth multiples of 8, rank 0 to 256 (0: no tail). `stream` is a
// cudaStream_t; nothing waits for the device. The launcher returns a cudaError_t or 0:
// cudaErrorInvalidValue for a problem outside these limits.
#pragma once

#include <cstdint>

#include "../lora_linear.h"

namespace rankwise::kernels {

struct Operand {
  const void* data;
  int64_t stride;
};

// A pass over a wide matrix that some blocks of the launch do beside the product: those that its
// last round of tiles would leave without work. For up to 16 directions of the product's type, or
// of float32 over bfloat16 as their parts (split_term.h), without dropout.
//
//   forward   hidden = x A^T, and scale * hidden o E^T into tail_left, which tiles wait for; x is
//             left
//   gradient  partial[i] = dh^T x over the i-th chunk of rows, as FinishColumns takes slices
//
// A tile waits for blocks that have begun before its own: they end whatever the device has room
// for.
struct Beside {
  int blocks = 0;
  int64_t rank = 0;
  bool cut = false;  // A and dh are parts, [cut_rows, depth] and [rows, cut_rows]
  // forward
  Operand A = {};           // [rank, depth]
  const void* E = nullptr;  // [rank], or null
  float scale = 1.0f;
  void* hidden = nullptr;     // written, [rows, rank], of the factors' type
  uint32_t* flags = nullptr;  // beside_flags(rows) of them, for this launch alone
  // gradient
  Operand x = {}, dh = {};   // [rows, cols], [rows, rank]
  int chunk = 0;             // of 128 rows
  float* partial = nullptr;  // written, [beside_slices(rows, chunk), cols, rank up to 8 i]
};
int64_t beside_flags(int64_t rows);
int64_t beside_slices(int64_t rows, int chunk);
int64_t beside_partial_bytes(int64_t slices, int64_t cols, int64_t rank);
// A chunk that makes about four slices.
int beside_chunk(int64_t rows);

struct LinearProduct {
  int64_t rows, cols, depth, rank;
  Type type;          // bfloat16 or float16
  bool right_by_row;  // right is [depth, cols] and tail_right [rank, cols]; else [cols, depth], ...
  Operand left;       // [rows, depth]
  Operand right;
  Operand tail_left;  // [rows, rank]; unused without rank
  Operand tail_right;
  const void* bias;  // [cols], or null
  void* out;         // written, [rows, cols]
  int64_t out_stride;
  int multiprocessors;       // of the device: one block each
  DropoutMask dropout = {};  // of the term, as of a matrix like `out`; for right_by_row
  Beside beside = {};
};

// Whether the launcher takes the problem.
bool takes(const LinearProduct& problem);

int launch_linear_product(const LinearProduct& problem, void* stream);

}  // namespace rankwise::kernels
