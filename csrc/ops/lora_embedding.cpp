// lora_embedding: the public C++ function, the typed dispatcher calls, and the kernel of the public
// op below autograd (which keeps the output of the forward op and drops the rest).
#include <rankwise/ops.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatch.h"
#include "find_op.h"

namespace rankwise {
namespace {

at::Tensor lora_embedding_below_autograd(const at::Tensor& indices, const at::Tensor& weight,
                                         const at::Tensor& lora_A, const at::Tensor& lora_B,
                                         const std::optional<at::Tensor>& lora_E, double scaling,
                                         int64_t padding_idx, std::optional<c10::SymInt> rank) {
  check_table("lora_embedding", indices, weight);
  const c10::SymInt active = active_rank("lora_embedding", lora_A, weight.sym_size(0), rank);
  return std::get<0>(lora_embedding_forward(
      indices, weight, {lora_A, lora_B, lora_E, scaling, 0.0, active}, padding_idx));
}

}  // namespace

at::Tensor lora_embedding(const at::Tensor& indices, const at::Tensor& weight,
                          const at::Tensor& lora_A, const at::Tensor& lora_B,
                          const std::optional<at::Tensor>& lora_E, double scaling,
                          int64_t padding_idx, std::optional<int64_t> rank) {
  static const auto op =
      find_op<decltype(lora_embedding_below_autograd)>("rankwise::lora_embedding");
  std::optional<c10::SymInt> symbolic_rank;
  if (rank) symbolic_rank = *rank;
  return op.call(indices, weight, lora_A, lora_B, lora_E, scaling, padding_idx, symbolic_rank);
}

EmbeddingForwardResult lora_embedding_forward(const at::Tensor& indices, const at::Tensor& weight,
                                              const AdapterOperands& adapter, int64_t padding_idx) {
  static const auto op = find_op<decltype(embedding_forward<lora_embedding_forward>)>(
      "rankwise::_lora_embedding_forward");
  const auto& [lora_A, lora_B, lora_E, scaling, dropout_p, rank] = adapter;
  return op.call(indices, weight, lora_A, lora_B, lora_E, scaling, padding_idx, rank);
}

EmbeddingBackwardResult lora_embedding_backward(const at::Tensor& grad_output,
                                                const at::Tensor& indices, const at::Tensor& weight,
                                                const AdapterOperands& adapter,
                                                const at::Tensor& hidden, int64_t padding_idx,
                                                std::array<bool, 4> output_mask) {
  static const auto op = find_op<decltype(embedding_backward<lora_embedding_backward>)>(
      "rankwise::_lora_embedding_backward");
  const auto& [lora_A, lora_B, lora_E, scaling, dropout_p, rank] = adapter;
  return op.call(grad_output, indices, weight, lora_A, lora_B, lora_E, hidden, scaling, padding_idx,
                 rank, output_mask);
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("lora_embedding", &rankwise::lora_embedding_below_autograd);
}
