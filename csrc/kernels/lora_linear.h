// The skinny products of lora_linear on the device: launchers over raw pointers, no torch.
//
// x and dy are "wide": [rows, cols] with unit column stride, read once per call. Everything else is
// `rank` wide, 1..max_rank. With mask(x) the dropped elements of x set to zero, unscaled:
//   shrink           hidden = keep_scale * mask(x) A^T,   gated = gated_scale * hidden o E^T
//   output_gradient  dh = scaling * keep_scale * (dy B) o E^T
//                    g = scaling * hidden^T dy,   dB = (g o E)^T,   dE_i = sum_n B[n, i] g[i, n]
//   input_factor_gradient   dA = dh^T mask(x)
//   expand           out = scale * mask(H A),   scale * mask(H B^T),
//                    scale * H B^T + bias   or   scale * H B^T + base
//
// Types: a wide matrix is bfloat16, float16 or float32; the factors (A, B, E), hidden, gated, dh
// and the factors' gradients share one type, that of the wide matrix or float32. Products are
// exact, sums are float32, results are rounded once. Sums have a fixed order that depends on the
// shape alone; no atomics on floats: the same input gives the same bits. Any size, pointer
// alignment and stride (in elements; rows must not overlap in what is written); matrices whose rows
// start at multiples of 16 bytes are read faster.
//
// All pointers are device pointers, `stream` is a cudaStream_t, and nothing waits for the device.
// Launchers return the first launch's error (cudaError_t) or 0. Sizes may be 0: what has no
// elements is not written, and sums over nothing are zeros. `scratch` has the bytes that
// *_scratch_bytes gives for the same problem, aligned to 16, and may be used again by what follows
// on the stream.
#pragma once

#include <cstdint>

#include "split_term.h"

namespace rankwise::kernels {

enum class Type { bfloat16, float16, float32 };

constexpr int64_t max_rank = 256;

// Element i * cols + j of the wide matrix is dropped when its number (dropout_mask.h) is below
// `threshold`. 0: nothing is dropped and `seed` is not read.
struct DropoutMask {
  const int64_t* seed = nullptr;  // on the device
  uint32_t threshold = 0;
};

// Where a pass writes its gated result as the left matrix of the term that linear_product.h takes,
// for a pointer: in the factors' type with rows `stride` apart; or, `split`, float32 in parts
// (split_term.h), [rows, 3 rank], and then the right matrix's parts too, if it has rows.
struct TermLeft {
  void* data = nullptr;
  int64_t stride = 0;
  bool split = false;
};

struct Shrink {
  int64_t rows, cols, rank;
  Type wide_type, factor_type;
  const void* x;  // [rows, cols]
  int64_t x_stride;
  const void* A;  // [rank, cols]
  int64_t A_stride;
  const void* E;  // [rank], or null
  float keep_scale;
  DropoutMask dropout;
  void* hidden;  // written, [rows, rank]
  void* gated;   // written, [rows, rank], or null
  float gated_scale = 1.0f;
  TermLeft term = {};  // takes `gated`
  SplitMatrix term_right = {};
};
int64_t shrink_scratch_bytes(const Shrink& problem);
int launch_shrink(const Shrink& problem, void* scratch, void* stream);

struct OutputGradient {
  int64_t rows, cols, rank;
  Type wide_type, factor_type;
  const void* dy;  // [rows, cols]
  int64_t dy_stride;
  const void* B;  // [cols, rank]
  int64_t B_stride;
  const void* E;       // [rank], or null
  const void* hidden;  // [rows, rank]; may be null when neither dB nor dE is asked for
  float scaling, keep_scale;
  void* dh;  // written, [rows, rank], or null
  void* dB;  // written, [cols, rank], or null
  int64_t dB_stride;
  void* dE;            // written, [rank], or null
  TermLeft term = {};  // takes `dh`, for a dh that is asked for
  SplitMatrix term_right = {};
  bool dE_later = false;  // InputFactorGradient::gate writes it
  void* dh_cut =
      nullptr;  // takes the parts of a float32 dh (split_term.h), [rows, cut_rows], or null
};
int64_t output_gradient_scratch_bytes(const OutputGradient& problem);
int launch_output_gradient(const OutputGradient& problem, void* scratch, void* stream);

// dE_i = sum_n B[n, i] g[n, i], the sums g of a column behind one another, rows `rank` rounded up
// to a multiple of 8.
struct GateGradient {
  int64_t cols = 0, rank = 0;
  const void* B = nullptr;  // [cols, rank]
  int64_t B_stride = 0;
  const float* g = nullptr;
  void* dE = nullptr;  // written, [rank]
};
// What a launch with the same scratch left for later.
GateGradient gate_gradient(const OutputGradient& problem, void* scratch);

struct InputFactorGradient {
  int64_t rows, cols, rank;
  Type wide_type, factor_type;
  const void* x;  // [rows, cols]
  int64_t x_stride;
  const void* dh;  // [rows, rank]
  DropoutMask dropout;
  void* dA;  // written, [rank, cols]
  int64_t dA_stride;
  GateGradient gate = {};
};
int64_t input_factor_gradient_scratch_bytes(const InputFactorGradient& problem);
int launch_input_factor_gradient(const InputFactorGradient& problem, void* scratch, void* stream);
// The same from slices that hopper/linear_product.h has summed up: x, dh and dropout are unused.
int launch_input_factor_end(const InputFactorGradient& problem, const float* partial,
                            int64_t slices, void* stream);

struct Expand {
  int64_t rows, cols, rank;
  Type wide_type, factor_type;
  const void* hidden;  // [rows, rank]
  const void* factor;  // A [rank, cols], or B [cols, rank] with `transposed`
  int64_t factor_stride;
  bool transposed;
  float scale;
  DropoutMask dropout;
  void* out;  // written, [rows, cols]
  int64_t out_stride;
  // At most one of these, of wide_type, is added; for `transposed` without dropout.
  const void* bias = nullptr;  // [cols]
  const void* base = nullptr;  // [rows, cols]; may be `out` itself
  int64_t base_stride = 0;
};
int launch_expand(const Expand& problem, void* stream);

}  // namespace rankwise::kernels
