// The singular directions of a low-rank update M = B A, found by way of its factors: QR of each and
// an SVD of [rank, rank]; the [out, in] product is never formed. All in float64 on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace rankwise {

// A copy in float64 on the CPU.
at::Tensor doubles(const at::Tensor& tensor);

// M = U diag(S) V^T, and how the factors lie to it.
struct Spectrum {
  at::Tensor U;   // [out, rank]
  at::Tensor S;   // [rank], falling
  at::Tensor V;   // [in, rank]
  at::Tensor BU;  // B^T U, [rank, rank]: row j tells of column j of B
  at::Tensor AV;  // A V, [rank, rank]: row j tells of row j of A

  // Whether a singular value is too small for its vectors to be known.
  bool empty(int64_t i) const;
};

// A [rank, in], B [out, rank]; rank at most min(in, out).
Spectrum spectrum_of(const at::Tensor& A, const at::Tensor& B);

// dL/dS [rank] from the factors' gradients, which are those of a loss of M alone: the mean of
//
//   u_i^T gB (B^T u_i) / s_i   and   (gA v_i)^T (A v_i) / s_i,
//
// both of which are u_i^T (dL/dM) v_i. Zero where the direction is empty.
at::Tensor singular_gradients(const Spectrum& spectrum, const at::Tensor& gA, const at::Tensor& gB);

// For each column of B (row of A) the singular direction that continues it: those of the largest
// |u^T b| |a v| / (|b| |a|), each taken once.
std::vector<int64_t> continued(const Spectrum& spectrum, const at::Tensor& A, const at::Tensor& B);

// The factors of M with the directions `kept` alone, a_i = lengths[i]:
//
//   A' = diag(a) V_k^T = T_A^T A,      T_A = B^T U_k diag(a / s)
//   B' = U_k diag(s / a) = B T_B,      T_B = A V_k diag(1 / a)          [rank, kept]
//
// so that gradients change as gB' = gB T_A and gA' = T_B^T gA, averages of gradients likewise, and
// averages of their squares, as far as a diagonal can tell, by the squares of the maps' elements.
// Of an empty direction B' and both maps are zero.
//
// With the lengths that rows had, directions that lie apart already stay as they are, and the
// others take steps of the size they took. The split sqrt(s), sqrt(s) of the literature makes the
// steps of weak directions larger by 1 / s at once: with SGD and momentum trainings diverge.
struct Repacked {
  at::Tensor A, B, T_A, T_B;
};
Repacked repacked(const Spectrum& spectrum, const std::vector<int64_t>& kept,
                  const std::vector<double>& lengths);

// The length that a new row of A gets: the median of the rows', or that of Kaiming's first values.
double row_length(const at::Tensor& A);

// `count` orthonormal rows [count, in], orthogonal to those of A: the first of `preferred`, which
// are so already, and random ones, from `seed` alone, where these are too few or undefined.
at::Tensor fresh_rows(const at::Tensor& A, const at::Tensor& preferred, int64_t count,
                      uint64_t seed);

}  // namespace rankwise
