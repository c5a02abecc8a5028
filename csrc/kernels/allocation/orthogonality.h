// The orthogonality penalty of all factors at once on the device: launchers over a table of
// factors, no torch. With F the `rank` active directions of a factor as rows, D = F F^T - I:
//   penalty    the sum of ||D||^2 over all factors, or the mean of ||D||
//   gradient   grad_output * (4 D F), or grad_output * (2 D F / ||D||) / factors, 0 where D is 0
//
// The table is filled on the host, laid out by lay_out() and copied to the device. All factors have
// one type; sums are double for double factors and float32 for all others, terms and their sum
// double. Sums have a fixed order that depends on shapes alone; no atomics. `stream` is a
// cudaStream_t, nothing waits for the device, and launchers return the first launch's error
// (cudaError_t) or 0.
#pragma once

#include <cstdint>

#include "../element_type.h"

namespace rankwise::kernels {

// Element `feature` of direction i lies at i * direction_stride + feature * feature_stride.
struct OrthogonalityEntry {
  const void* data;
  int64_t rank, capacity, features;
  int64_t direction_stride, feature_stride;
  void* gradient;                         // contiguous, in the order of the factor's dimensions
  bool directions_are_rows;               // of the gradient: [capacity, features], else transposed
  int64_t first_tile = 0, first_sum = 0;  // by lay_out()
  int64_t first_gradient_tile = 0;
};

struct OrthogonalityBlocks {
  int64_t tiles, gradient_tiles;
  int64_t sums;  // numbers of all D, of double for double factors and float32 for others
};
OrthogonalityBlocks lay_out(OrthogonalityEntry* factors, int64_t count);

struct Orthogonality {
  const OrthogonalityEntry* factors;
  int64_t count;
  OrthogonalityBlocks blocks;
  ElementType type;
  bool squared;
  void* deviations;  // scratch, [blocks.sums]
  double* terms;     // scratch, [count]
};
// `penalty` is one double or float32, as sums are.
int launch_orthogonality_penalty(const Orthogonality& problem, void* penalty, void* stream);
// `grad_output` has the penalty's type. Gradients of inactive directions are zeros.
int launch_orthogonality_gradient(const Orthogonality& problem, const void* grad_output,
                                  void* stream);

}  // namespace rankwise::kernels
