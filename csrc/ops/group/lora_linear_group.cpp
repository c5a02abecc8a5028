// lora_linear_group: the public C++ function, the typed dispatcher calls, and the kernel of the
// public op below autograd.
#include <torch/library.h>

#include "../find_op.h"
#include "../layer_group.h"

namespace rankwise {
namespace {

Tensors lora_linear_group_below_autograd(const at::Tensor& input, at::TensorList weights,
                                         const OptionalTensors& biases, at::TensorList lora_A,
                                         at::TensorList lora_B, const OptionalTensors& lora_E,
                                         at::ArrayRef<double> scaling, double dropout_p,
                                         at::OptionalSymIntArrayRef ranks) {
  return lora_linear_group_forward(
             input, listed(weights, &biases, lora_A, lora_B, lora_E, scaling, dropout_p, ranks))
      .outputs;
}

// A group's operands as the schemas have them.
struct Lists {
  Tensors weights, lora_A, lora_B;
  OptionalTensors biases, lora_E;
  std::vector<double> scaling;
  std::vector<c10::SymInt> ranks;

  explicit Lists(const std::vector<GroupedLinear>& layers) {
    for (const GroupedLinear& layer : layers) {
      weights.push_back(layer.weight);
      biases.push_back(layer.bias);
      lora_A.push_back(layer.lora_A);
      lora_B.push_back(layer.lora_B);
      lora_E.push_back(layer.lora_E);
      scaling.push_back(layer.scaling);
      ranks.push_back(layer.rank ? *layer.rank : layer.lora_A.sym_size(0));
    }
  }
};

}  // namespace

std::vector<at::Tensor> lora_linear_group(const at::Tensor& input,
                                          const std::vector<GroupedLinear>& layers,
                                          double dropout_p) {
  static const auto op =
      find_op<decltype(lora_linear_group_below_autograd)>("rankwise::lora_linear_group");
  const Lists l(layers);
  return op.call(input, l.weights, l.biases, l.lora_A, l.lora_B, l.lora_E, l.scaling, dropout_p,
                 at::OptionalSymIntArrayRef(l.ranks));
}

GroupForwardResult lora_linear_group_forward(const at::Tensor& input, const LayerGroup& group) {
  static const auto op = find_op<decltype(group_forward<lora_linear_group_forward>)>(
      "rankwise::_lora_linear_group_forward");
  const Lists l(group.layers);
  return forward_result(op.call(input, l.weights, l.biases, l.lora_A, l.lora_B, l.lora_E, l.scaling,
                                group.dropout_p, l.ranks));
}

GroupGradients lora_linear_group_backward(const std::vector<at::Tensor>& grad_outputs,
                                          const at::Tensor& input, const LayerGroup& group,
                                          const at::Tensor& hidden, const at::Tensor& seed,
                                          const GroupMask& output_mask) {
  static const auto op = find_op<decltype(group_backward<lora_linear_group_backward>)>(
      "rankwise::_lora_linear_group_backward");
  const Lists l(group.layers);
  return gradients(op.call(grad_outputs, input, l.weights, l.lora_A, l.lora_B, l.lora_E, hidden,
                           seed, l.scaling, group.dropout_p, l.ranks, output_mask),
                   group, output_mask);
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_group", &rankwise::lora_linear_group_below_autograd);
}
