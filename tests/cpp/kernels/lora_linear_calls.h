// The launchers of lora_linear.h as functions of matrices, without dropout and gate.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>

#include "matrices.h"

namespace rankwise::kernels {

// x A^T for A [rank, in].
template <typename Wide, typename Factor>
Matrix<Factor> shrunk(const Matrix<Wide>& x, const Matrix<Factor>& A) {
  Matrix<Factor> hidden(x.rows, A.rows);
  const Shrink p{x.rows,   x.cols,        A.rows,        type_of<Wide>, type_of<Factor>,
                 x.data(), x.stride,      A.data(),      A.stride,      nullptr,
                 1.0f,     DropoutMask{}, hidden.data(), nullptr};
  const cuda_model::DeviceArray<float> scratch(shrink_scratch_bytes(p) / 4);
  EXPECT_EQ(launch_shrink(p, scratch.data(), nullptr), 0);
  return hidden;
}

// dh = dy B for B [out, rank], and dB = dy^T hidden.
template <typename Factor>
struct FromOutput {
  Matrix<Factor> dh, dB;
};

template <typename Wide, typename Factor>
FromOutput<Factor> output_gradients(const Matrix<Wide>& dy, const Matrix<Factor>& B,
                                    const Matrix<Factor>& hidden) {
  FromOutput<Factor> result{Matrix<Factor>(dy.rows, B.cols), Matrix<Factor>(dy.cols, B.cols)};
  const OutputGradient p{dy.rows,          dy.cols,   B.cols,   type_of<Wide>,    type_of<Factor>,
                         dy.data(),        dy.stride, B.data(), B.stride,         nullptr,
                         hidden.data(),    1.0f,      1.0f,     result.dh.data(), result.dB.data(),
                         result.dB.stride, nullptr};
  const cuda_model::DeviceArray<float> scratch(output_gradient_scratch_bytes(p) / 4);
  EXPECT_EQ(launch_output_gradient(p, scratch.data(), nullptr), 0);
  return result;
}

// dh^T x.
template <typename Wide, typename Factor>
Matrix<Factor> input_factor_gradient(const Matrix<Wide>& x, const Matrix<Factor>& dh) {
  Matrix<Factor> dA(dh.cols, x.cols);
  const InputFactorGradient p{x.rows,          x.cols,    dh.cols,  type_of<Wide>,
                              type_of<Factor>, x.data(),  x.stride, dh.data(),
                              DropoutMask{},   dA.data(), dA.stride};
  const cuda_model::DeviceArray<float> scratch(input_factor_gradient_scratch_bytes(p) / 4);
  EXPECT_EQ(launch_input_factor_gradient(p, scratch.data(), nullptr), 0);
  return dA;
}

// Writes scale * hidden A for A [rank, in], or scale * hidden B^T for B [out, rank].
template <typename Wide, typename Factor>
Expand expansion(const Matrix<Factor>& hidden, const Matrix<Factor>& factor, bool transposed,
                 float scale, const Matrix<Wide>& out) {
  return {hidden.rows,   out.cols,      hidden.cols,   type_of<Wide>, type_of<Factor>,
          hidden.data(), factor.data(), factor.stride, transposed,    scale,
          DropoutMask{}, out.data(),    out.stride};
}

template <typename Wide, typename Factor>
Matrix<Wide> expanded(const Matrix<Factor>& hidden, const Matrix<Factor>& factor, bool transposed,
                      float scale) {
  Matrix<Wide> out(hidden.rows, transposed ? factor.rows : factor.cols);
  EXPECT_EQ(launch_expand(expansion(hidden, factor, transposed, scale, out), nullptr), 0);
  return out;
}

// y += scale * hidden B^T for B [out, rank], in place.
template <typename Wide, typename Factor>
void add_expanded(const Matrix<Wide>& y, const Matrix<Factor>& hidden, const Matrix<Factor>& B,
                  float scale) {
  Expand p = expansion(hidden, B, /*transposed=*/true, scale, y);
  p.base = y.data();
  p.base_stride = y.stride;
  EXPECT_EQ(launch_expand(p, nullptr), 0);
}

}  // namespace rankwise::kernels
