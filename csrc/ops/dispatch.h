// The inner ops as typed calls into the dispatcher: forwards with what backwards need, backwards,
// and the dropout mask. Their schemas stand in schema.cpp; every backend registers kernels for
// them.
//
// The dispatcher wants every operand as an argument of its own. Beyond it an adapter's operands are
// one: kernels take them so and are registered through linear_forward<kernel> and its like.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

namespace rankwise {

// An adapter as a call gives it: lora_A [capacity, in], lora_B [out, capacity], lora_E
// [capacity, 1] or none; `rank` leading directions are active. An embedding has no dropout.
struct AdapterOperands {
  const at::Tensor& lora_A;
  const at::Tensor& lora_B;
  const std::optional<at::Tensor>& lora_E;
  double scaling;
  double dropout_p;
  c10::SymInt rank;

  int64_t active() const { return rank.guard_int(__FILE__, __LINE__); }
};

// output [..., out]; hidden = drop(x) A^T, [tokens, rank], adapter dtype; seed int64 [1], or [0]
// without dropout.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// Gradients of input, weight, bias, lora_A, lora_B, lora_E; undefined where not asked for.
using BackwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

using LinearForward = ForwardResult(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias,
                                    const AdapterOperands& adapter);
using LinearBackward = BackwardResult(const at::Tensor& grad_output, const at::Tensor& input,
                                      const at::Tensor& weight, const AdapterOperands& adapter,
                                      const at::Tensor& hidden, const at::Tensor& seed,
                                      std::array<bool, 6> output_mask);
LinearForward lora_linear_forward;
LinearBackward lora_linear_backward;

// The same without a base's product: output = base_output + the update. Gradients of input, lora_A,
// lora_B, lora_E; that of base_output is the output's own.
using UpdateBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

using UpdateForward = ForwardResult(const at::Tensor& base_output, const at::Tensor& input,
                                    const AdapterOperands& adapter);
using UpdateBackward = UpdateBackwardResult(const at::Tensor& grad_output, const at::Tensor& input,
                                            const AdapterOperands& adapter,
                                            const at::Tensor& hidden, const at::Tensor& seed,
                                            std::array<bool, 4> output_mask);
UpdateForward lora_update_forward;
UpdateBackward lora_update_backward;

// [rows, cols] of 0 and 1 in `dtype`: element (i, j) depends on seed and i * cols + j alone.
at::Tensor dropout_mask(const at::Tensor& seed, c10::SymInt rows, c10::SymInt cols,
                        double dropout_p, at::ScalarType dtype);

// output [..., dim] as weight; hidden = A^T[indices], [tokens, rank], adapter dtype. The padding
// index matters to the composite form's gradients alone.
using EmbeddingForwardResult = std::tuple<at::Tensor, at::Tensor>;
// Gradients of weight, lora_A, lora_B, lora_E; undefined where not asked for.
using EmbeddingBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

using EmbeddingForward = EmbeddingForwardResult(const at::Tensor& indices, const at::Tensor& weight,
                                                const AdapterOperands& adapter,
                                                int64_t padding_idx);
using EmbeddingBackward = EmbeddingBackwardResult(const at::Tensor& grad_output,
                                                  const at::Tensor& indices,
                                                  const at::Tensor& weight,
                                                  const AdapterOperands& adapter,
                                                  const at::Tensor& hidden, int64_t padding_idx,
                                                  std::array<bool, 4> output_mask);
EmbeddingForward lora_embedding_forward;
EmbeddingBackward lora_embedding_backward;

// The functions of the schemas.

template <LinearForward& kernel>
ForwardResult linear_forward(const at::Tensor& input, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, const at::Tensor& lora_A,
                             const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                             double scaling, double dropout_p, c10::SymInt rank) {
  return kernel(input, weight, bias, {lora_A, lora_B, lora_E, scaling, dropout_p, std::move(rank)});
}

template <LinearBackward& kernel>
BackwardResult linear_backward(const at::Tensor& grad_output, const at::Tensor& input,
                               const at::Tensor& weight, const at::Tensor& lora_A,
                               const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                               const at::Tensor& hidden, const at::Tensor& seed, double scaling,
                               double dropout_p, c10::SymInt rank,
                               std::array<bool, 6> output_mask) {
  return kernel(grad_output, input, weight,
                {lora_A, lora_B, lora_E, scaling, dropout_p, std::move(rank)}, hidden, seed,
                output_mask);
}

template <UpdateForward& kernel>
ForwardResult update_forward(const at::Tensor& base_output, const at::Tensor& input,
                             const at::Tensor& lora_A, const at::Tensor& lora_B,
                             const std::optional<at::Tensor>& lora_E, double scaling,
                             double dropout_p, c10::SymInt rank) {
  return kernel(base_output, input, {lora_A, lora_B, lora_E, scaling, dropout_p, std::move(rank)});
}

template <UpdateBackward& kernel>
UpdateBackwardResult update_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                     const at::Tensor& lora_A, const at::Tensor& lora_B,
                                     const std::optional<at::Tensor>& lora_E,
                                     const at::Tensor& hidden, const at::Tensor& seed,
                                     double scaling, double dropout_p, c10::SymInt rank,
                                     std::array<bool, 4> output_mask) {
  return kernel(grad_output, input, {lora_A, lora_B, lora_E, scaling, dropout_p, std::move(rank)},
                hidden, seed, output_mask);
}

template <EmbeddingForward& kernel>
EmbeddingForwardResult embedding_forward(const at::Tensor& indices, const at::Tensor& weight,
                                         const at::Tensor& lora_A, const at::Tensor& lora_B,
                                         const std::optional<at::Tensor>& lora_E, double scaling,
                                         int64_t padding_idx, c10::SymInt rank) {
  return kernel(indices, weight, {lora_A, lora_B, lora_E, scaling, 0.0, std::move(rank)},
                padding_idx);
}

template <EmbeddingBackward& kernel>
EmbeddingBackwardResult embedding_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                           const at::Tensor& weight, const at::Tensor& lora_A,
                                           const at::Tensor& lora_B,
                                           const std::optional<at::Tensor>& lora_E,
                                           const at::Tensor& hidden, double scaling,
                                           int64_t padding_idx, c10::SymInt rank,
                                           std::array<bool, 4> output_mask) {
  return kernel(grad_output, indices, weight,
                {lora_A, lora_B, lora_E, scaling, 0.0, std::move(rank)}, hidden, padding_idx,
                output_mask);
}

}  // namespace rankwise
