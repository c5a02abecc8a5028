// lora_linear_group from the composite form of each layer, with one seed for all.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dropout.h"
#include "../layer_group.h"
#include "../lora_linear_composite.h"

namespace rankwise {

GroupForwardResult lora_linear_group_forward_composite(const at::Tensor& input,
                                                       const LayerGroup& group) {
  check_group(input, group);
  GroupForwardResult result;
  result.seed = Dropout(group.dropout_p).draw_seed(input);
  std::vector<at::Tensor> hidden;
  for (size_t i = 0; i < group.size(); ++i) {
    auto [output, own] =
        lora_linear_of_seed(input, group[i].weight, group[i].bias, group.adapter(i), result.seed);
    result.outputs.push_back(output);
    hidden.push_back(own);
  }
  result.hidden = at::cat(hidden, -1);
  return result;
}

GroupGradients lora_linear_group_backward_composite(
    const std::vector<at::Tensor>& grad_outputs, const at::Tensor& input, const LayerGroup& group,
    const at::Tensor& hidden, const at::Tensor& seed, const GroupMask& output_mask) {
  check_group_backward(grad_outputs, input, group, hidden, seed);
  GroupGradients result;
  for (size_t i = 0; i < group.size(); ++i) {
    GroupMask mask = output_mask;
    mask[5] = mask[5] && has(group[i].lora_E);
    auto [dx, dw, db, dA, dB, dE] = lora_linear_backward_composite(
        grad_outputs[i], input, group[i].weight, group.adapter(i),
        hidden.narrow_symint(1, group.offset(i), *group[i].rank), seed, mask);
    result.layers.push_back({dw, db, dA, dB, dE});
    if (mask[0]) result.input = result.input.defined() ? result.input + dx : dx;
  }
  return result;
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("_lora_linear_group_forward",
         &rankwise::group_forward<rankwise::lora_linear_group_forward_composite>);
  m.impl("_lora_linear_group_backward",
         &rankwise::group_backward<rankwise::lora_linear_group_backward_composite>);
}
