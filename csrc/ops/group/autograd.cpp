// lora_linear_group's gradient: one node for all layers that saves x by reference, `hidden` of all
// and the dropout seed.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../differentiation.h"
#include "../layer_group.h"

namespace rankwise {
// A named namespace would let another library's class of the same name replace this one at run
// time.
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A layer's tensors in the order of LayerGradients, undefined where absent.
std::array<at::Tensor, 5> tensors_of(const GroupedLinear& layer) {
  return {layer.weight, layer.bias.value_or(at::Tensor()), layer.lora_A, layer.lora_B,
          layer.lora_E.value_or(at::Tensor())};
}

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

class LoraLinearGroupFunction : public torch::autograd::Function<LoraLinearGroupFunction> {
 public:
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  // `present`: the group's tensors that are there, whose edges the node has after input's.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& input,
                               at::TensorList /*present*/, const LayerGroup& group) {
    GroupForwardResult result = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return lora_linear_group_forward(input, group);
    }();
    variable_list saved = {input, result.hidden, result.seed};
    std::vector<double> scaling;
    std::vector<c10::SymInt> ranks;
    std::vector<int64_t> biases;
    for (const GroupedLinear& layer : group.layers) {
      saved.insert(saved.end(),
                   {layer.weight, layer.lora_A, layer.lora_B, layer.lora_E.value_or(at::Tensor())});
      scaling.push_back(layer.scaling);
      ranks.push_back(*layer.rank);
      biases.push_back(has(layer.bias) ? 1 : 0);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["dropout_p"] = group.dropout_p;
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["ranks"] = c10::SymIntArrayRef(ranks);
    ctx->saved_data["biases"] = biases;
    ctx->set_materialize_grads(false);
    return result.outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const LayerGroup group = saved_group(ctx, saved);
    const std::vector<int64_t> biases = ctx->saved_data["biases"].toIntVector();
    const std::vector<size_t> used = used_of(grad_outputs);
    const auto [mask, edges] = needed(ctx, group, biases);
    variable_list result(edges + 1);
    if (used.empty()) return result;
    variable_list dy, hidden;
    for (const size_t i : used) {
      dy.push_back(grad_outputs[i]);
      hidden.push_back(saved[1].narrow_symint(1, group.offset(i), *group[i].rank));
    }
    const GroupGradients d = lora_linear_group_backward(
        dy, saved[0], group.of(used), used.size() == group.size() ? saved[1] : at::cat(hidden, 1),
        saved[2], mask);
    result[0] = d.input;
    size_t edge = 1;
    for (size_t i = 0, next = 0; i < group.size(); ++i) {
      const bool is_used = next < used.size() && used[next] == i;
      for (size_t kind = 0; kind < 5; ++kind) {
        if (!present(group[i], biases[i] != 0, kind)) continue;
        if (is_used && ctx->needs_input_grad(edge)) result[edge] = d.layers[next][kind];
        ++edge;
      }
      if (is_used) ++next;
    }
    return result;
  }

 private:
  // The layers some of whose output reaches the loss; the others' parameters get no gradient.
  static std::vector<size_t> used_of(const variable_list& grad_outputs) {
    std::vector<size_t> result;
    for (size_t i = 0; i < grad_outputs.size(); ++i)
      if (grad_outputs[i].defined()) result.push_back(i);
    return result;
  }

  static bool present(const GroupedLinear& layer, bool bias, size_t kind) {
    return kind == 1 ? bias : kind != 4 || has(layer.lora_E);
  }

  // What any of the layers needs, and the number of edges.
  static std::pair<GroupMask, size_t> needed(AutogradContext* ctx, const LayerGroup& group,
                                             const std::vector<int64_t>& biases) {
    GroupMask mask{ctx->needs_input_grad(0)};
    size_t edge = 1;
    for (size_t i = 0; i < group.size(); ++i) {
      for (size_t kind = 0; kind < 5; ++kind) {
        if (!present(group[i], biases[i] != 0, kind)) continue;
        mask[kind + 1] = ctx->needs_input_grad(edge++) || mask[kind + 1];
      }
    }
    return {mask, edge};
  }

  static LayerGroup saved_group(AutogradContext* ctx, const variable_list& saved) {
    const auto scaling = ctx->saved_data["scaling"].toDoubleVector();
    const auto ranks = ctx->saved_data["ranks"].toSymIntVector();
    LayerGroup group{{}, ctx->saved_data["dropout_p"].toDouble()};
    for (size_t i = 0; i < scaling.size(); ++i) {
      const at::Tensor* const own = &saved[3 + 4 * i];
      group.layers.push_back(
          {own[0], std::nullopt, own[1], own[2], if_defined(own[3]), scaling[i], ranks[i]});
    }
    return group;
  }
};

Tensors lora_linear_group_autograd(const at::Tensor& input, at::TensorList weights,
                                   const OptionalTensors& biases, at::TensorList lora_A,
                                   at::TensorList lora_B, const OptionalTensors& lora_E,
                                   at::ArrayRef<double> scaling, double dropout_p,
                                   at::OptionalSymIntArrayRef ranks) {
  const LayerGroup group =
      listed(weights, &biases, lora_A, lora_B, lora_E, scaling, dropout_p, ranks);
  variable_list present;
  for (const GroupedLinear& layer : group.layers)
    for (const at::Tensor& tensor : tensors_of(layer))
      if (tensor.defined()) present.push_back(tensor);
  if (beyond_nodes(input) || std::any_of(present.begin(), present.end(), has_tangent)) {
    return lora_linear_group_forward_composite(input, group).outputs;
  }
  return LoraLinearGroupFunction::apply(input, at::TensorList(present), group);
}

// Double backward: the gradients as a differentiable formula when somebody records them.
GroupGradients group_backward_autograd(const std::vector<at::Tensor>& grad_outputs,
                                       const at::Tensor& input, const LayerGroup& group,
                                       const at::Tensor& hidden, const at::Tensor& seed,
                                       const GroupMask& output_mask) {
  bool followed = recorded(input);
  for (const at::Tensor& dy : grad_outputs) followed = followed || recorded(dy);
  for (const GroupedLinear& layer : group.layers)
    for (const at::Tensor& tensor : tensors_of(layer)) followed = followed || recorded(tensor);
  if (followed) {
    return lora_linear_group_backward_composite(grad_outputs, input, group, hidden, seed,
                                                output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return lora_linear_group_backward(grad_outputs, input, group, hidden, seed, output_mask);
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, Autograd, m) {
  m.impl("lora_linear_group", &rankwise::lora_linear_group_autograd);
  m.impl("_lora_linear_group_backward",
         &rankwise::group_backward<rankwise::group_backward_autograd>);
  // The forward's other outputs have no gradient of their own: an error, not a silent zero.
  m.impl("_lora_linear_group_forward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(rankwise, FuncTorchBatchedDecomposition, m) {
  m.impl("lora_linear_group", &rankwise::lora_linear_group_autograd);
}
