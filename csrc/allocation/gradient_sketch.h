// What an adapter's directions do not see of the gradient G = dL/dW, from a few probes.
//
// Probes are columns W [out, n] of B, Gaussian of deviation probe_size, over rows of A that are
// zero: nothing of the output changes, and those rows' gradient is scaling * W^T G. Of the part off
// V, the row space of A,
//
//   E |W^T G (I - V V^T)|^2 / (n probe_size^2) = |G (I - V V^T)|^2     (Frobenius norms).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace rankwise {

// Small, so that a clip by the norm of all gradients hardly sees them; a power of two.
constexpr double probe_size = 1.0 / 1024;

struct GradientSketch {
  double energy = 0;  // the estimate of |G (I - V V^T)|^2
  at::Tensor rows;    // [at most n, in]: its right singular directions, the largest first
};

// [out, count] in float64 on the CPU, from `seed` alone.
at::Tensor probe_columns(int64_t out, int64_t count, uint64_t seed);

// `gradient` [n, in] of the zero rows, V [in, rank] orthonormal or undefined; float64 on the CPU.
GradientSketch sketch_of(const at::Tensor& gradient, const at::Tensor& V, double scaling);

}  // namespace rankwise
