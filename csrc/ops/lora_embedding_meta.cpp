// Shapes of lora_embedding's results, for torch.compile and export: symbolic sizes stay symbolic.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatch.h"

namespace rankwise {
namespace {

EmbeddingForwardResult lora_embedding_forward_meta(const at::Tensor& indices,
                                                   const at::Tensor& weight,
                                                   const AdapterOperands& operands,
                                                   int64_t /*padding_idx*/) {
  check_lora_embedding("lora_embedding", indices, weight, operands);
  auto shape = indices.sym_sizes().vec();
  shape.push_back(weight.sym_size(1));
  return {weight.new_empty_symint(shape),
          operands.lora_A.new_empty_symint({indices.sym_numel(), operands.rank})};
}

EmbeddingBackwardResult lora_embedding_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
    const AdapterOperands& operands, const at::Tensor& hidden, int64_t /*padding_idx*/,
    std::array<bool, 4> output_mask) {
  check_lora_embedding("lora_embedding", indices, weight, operands);
  check_embedding_backward("lora_embedding", grad_output, indices, weight, operands, hidden);
  const auto when = [&](int i, const at::Tensor& like) {
    return output_mask[i] ? like.new_empty_symint(like.sym_sizes()) : at::Tensor();
  };
  return {when(0, weight), when(1, operands.lora_A), when(2, operands.lora_B),
          output_mask[3] ? when(3, *operands.lora_E) : at::Tensor()};
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, Meta, m) {
  m.impl("_lora_embedding_forward",
         &rankwise::embedding_forward<rankwise::lora_embedding_forward_meta>);
  m.impl("_lora_embedding_backward",
         &rankwise::embedding_backward<rankwise::lora_embedding_backward_meta>);
}
