// Shapes of lora_embedding's results, for torch.compile and export: symbolic sizes stay symbolic.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatch.h"

namespace rankwise {
namespace {

EmbeddingForwardResult lora_embedding_forward_meta(
    const at::Tensor& indices, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E, double scaling,
    int64_t /*padding_idx*/, c10::SymInt rank) {
  check_lora_embedding("lora_embedding", indices, weight, lora_A, lora_B, lora_E, scaling, rank);
  auto shape = indices.sym_sizes().vec();
  shape.push_back(weight.sym_size(1));
  return {weight.new_empty_symint(shape), lora_A.new_empty_symint({indices.sym_numel(), rank})};
}

EmbeddingBackwardResult lora_embedding_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
    const at::Tensor& lora_A, const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
    const at::Tensor& hidden, double scaling, int64_t /*padding_idx*/, c10::SymInt rank,
    std::array<bool, 4> output_mask) {
  check_lora_embedding("lora_embedding", indices, weight, lora_A, lora_B, lora_E, scaling, rank);
  check_embedding_backward("lora_embedding", grad_output, indices, weight, lora_A, hidden, rank);
  const auto when = [&](int i, const at::Tensor& like) {
    return output_mask[i] ? like.new_empty_symint(like.sym_sizes()) : at::Tensor();
  };
  return {when(0, weight), when(1, lora_A), when(2, lora_B),
          output_mask[3] ? when(3, *lora_E) : at::Tensor()};
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, Meta, m) {
  m.impl("_lora_embedding_forward", &rankwise::lora_embedding_forward_meta);
  m.impl("_lora_embedding_backward", &rankwise::lora_embedding_backward_meta);
}
