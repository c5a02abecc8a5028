// The inner ops as typed calls into the dispatcher: forwards with what backwards need, backwards,
// and the dropout mask. Their schemas stand in schema.cpp; every backend registers kernels for
// them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <tuple>

namespace rankwise {

// output [..., out]; hidden = drop(x) A^T, [tokens, rank], adapter dtype; seed int64 [1], or [0]
// without dropout.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// Gradients of input, weight, bias, lora_A, lora_B, lora_E; undefined where not asked for.
using BackwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardResult lora_linear_forward(const at::Tensor& input, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& lora_A,
                                  const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                                  double scaling, double dropout_p, c10::SymInt rank);

BackwardResult lora_linear_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                    const at::Tensor& weight, const at::Tensor& lora_A,
                                    const at::Tensor& lora_B,
                                    const std::optional<at::Tensor>& lora_E,
                                    const at::Tensor& hidden, const at::Tensor& seed,
                                    double scaling, double dropout_p, c10::SymInt rank,
                                    std::array<bool, 6> output_mask);

// [rows, cols] of 0 and 1 in `dtype`: element (i, j) depends on seed and i * cols + j alone.
at::Tensor dropout_mask(const at::Tensor& seed, c10::SymInt rows, c10::SymInt cols,
                        double dropout_p, at::ScalarType dtype);

// output [..., dim] as weight; hidden = A^T[indices], [tokens, rank], adapter dtype. The padding
// index matters to the composite form's gradients alone.
using EmbeddingForwardResult = std::tuple<at::Tensor, at::Tensor>;
// Gradients of weight, lora_A, lora_B, lora_E; undefined where not asked for.
using EmbeddingBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

EmbeddingForwardResult lora_embedding_forward(const at::Tensor& indices, const at::Tensor& weight,
                                              const at::Tensor& lora_A, const at::Tensor& lora_B,
                                              const std::optional<at::Tensor>& lora_E,
                                              double scaling, int64_t padding_idx,
                                              c10::SymInt rank);

EmbeddingBackwardResult lora_embedding_backward(const at::Tensor& grad_output,
                                                const at::Tensor& indices, const at::Tensor& weight,
                                                const at::Tensor& lora_A, const at::Tensor& lora_B,
                                                const std::optional<at::Tensor>& lora_E,
                                                const at::Tensor& hidden, double scaling,
                                                int64_t padding_idx, c10::SymInt rank,
                                                std::array<bool, 4> output_mask);

}  // namespace rankwise
