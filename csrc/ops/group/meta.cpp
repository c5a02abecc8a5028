// Shapes of lora_linear_group's results, for torch.compile and export.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dropout.h"
#include "../layer_group.h"

namespace rankwise {
namespace {

GroupForwardResult group_forward_meta(const at::Tensor& input, const LayerGroup& group) {
  check_group(input, group);
  GroupForwardResult result;
  for (const GroupedLinear& layer : group.layers) {
    auto shape = input.sym_sizes().vec();
    shape.back() = layer.weight.sym_size(0);
    result.outputs.push_back(input.new_empty_symint(shape));
  }
  const c10::SymInt seeds = Dropout(group.dropout_p).active() ? 1 : 0;
  result.hidden = group[0].lora_A.new_empty_symint({sym_token_count(input), group.rank()});
  result.seed = input.new_empty_symint({seeds}, input.options().dtype(at::kLong));
  return result;
}

GroupGradients group_backward_meta(const std::vector<at::Tensor>& grad_outputs,
                                   const at::Tensor& input, const LayerGroup& group,
                                   const at::Tensor& hidden, const at::Tensor& seed,
                                   const GroupMask& output_mask) {
  check_group_backward(grad_outputs, input, group, hidden, seed);
  const auto [need_x, need_w, need_b, need_A, need_B, need_E] = output_mask;
  const auto when = [](bool needed, const at::Tensor& like) {
    return needed ? like.new_empty_symint(like.sym_sizes()) : at::Tensor();
  };
  GroupGradients result{when(need_x, input), {}};
  for (const GroupedLinear& layer : group.layers) {
    const at::Tensor bias =
        need_b ? layer.weight.new_empty_symint({layer.weight.sym_size(0)}) : at::Tensor();
    const bool gated = need_E && has(layer.lora_E);
    result.layers.push_back({when(need_w, layer.weight), bias, when(need_A, layer.lora_A),
                             when(need_B, layer.lora_B),
                             gated ? when(true, *layer.lora_E) : at::Tensor()});
  }
  return result;
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, Meta, m) {
  m.impl("_lora_linear_group_forward", &rankwise::group_forward<rankwise::group_forward_meta>);
  m.impl("_lora_linear_group_backward", &rankwise::group_backward<rankwise::group_backward_meta>);
}
