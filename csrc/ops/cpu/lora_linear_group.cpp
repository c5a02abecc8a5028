// lora_linear_group on the CPU: one projection of x for all layers, one sum for its gradient.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "../dropout.h"
#include "../layer_group.h"
#include "../matrices.h"
#include "adapter.h"
#include "base_gradients.h"
#include "base_term.h"
#include "dropout.h"
#include "lora_linear_aten.h"
#include "lora_linear_panels.h"
#include "path_choice.h"

namespace rankwise {
namespace {

AdapterGroup adapters_of(const LayerGroup& group, const at::Tensor& seed) {
  std::vector<ActiveAdapter> members;
  for (size_t i = 0; i < group.size(); ++i) members.emplace_back(group.adapter(i), seed);
  return AdapterGroup(std::move(members));
}

// A path is measured for single layers.
bool on_panels(const AdapterGroup& adapters, const at::Tensor& x) {
  return path_in_effect() != CpuPath::aten &&
         std::all_of(adapters.members.begin(), adapters.members.end(),
                     [&](const ActiveAdapter& member) { return in_panels(x, member); });
}

GroupForwardResult group_forward_cpu(const at::Tensor& input, const LayerGroup& group) {
  check_group(input, group);
  const at::Tensor seed = draw_seed_cpu(Dropout(group.dropout_p));
  const AdapterGroup adapters = adapters_of(group, seed);
  const at::Tensor x = matrix(input);
  std::vector<BaseTerm> bases;
  for (const GroupedLinear& layer : group.layers)
    bases.push_back({layer.weight, layer.bias.value_or(at::Tensor()), {}});
  auto [y, hidden] = on_panels(adapters, x) ? forward_in_panels(adapters, x, bases)
                                            : forward_on_aten(adapters, x, bases);
  std::vector<int64_t> shape = input.sizes().vec();
  for (at::Tensor& output : y) {
    shape.back() = output.size(1);
    output = in_shape(output, shape);
  }
  return {std::move(y), hidden, seed};
}

GroupGradients group_backward_cpu(const std::vector<at::Tensor>& grad_outputs,
                                  const at::Tensor& input, const LayerGroup& group,
                                  const at::Tensor& hidden, const at::Tensor& seed,
                                  const GroupMask& output_mask) {
  check_group_backward(grad_outputs, input, group, hidden, seed);
  const AdapterGroup adapters = adapters_of(group, seed);
  const at::Tensor x = matrix(input);
  std::vector<OutputTerm> outputs;
  for (size_t i = 0; i < group.size(); ++i)
    outputs.push_back({matrix(grad_outputs[i]), group[i].weight});
  const auto [need_x, need_w, need_b, need_A, need_B, need_E] = output_mask;
  const std::array<bool, 4> needed = {need_x, need_A, need_B, need_E};
  const FactorGradients d = on_panels(adapters, x)
                                ? backward_in_panels(adapters, outputs, x, hidden, needed)
                                : backward_on_aten(adapters, outputs, x, hidden, needed);
  GroupGradients result;
  if (need_x) result.input = in_shape(d.x, input.sizes());
  for (size_t i = 0; i < group.size(); ++i) {
    auto& [dw, db, dA, dB, dE] = result.layers.emplace_back();
    const ActiveAdapter& member = adapters.members[i];
    if (need_w) dw = weight_gradient(outputs[i].dy, x);
    if (need_b) db = bias_gradient(outputs[i].dy);
    if (need_A) {
      const at::Tensor own = d.A.narrow(0, adapters.offset(i), member.rank());
      dA = in_capacity(own.clone(), group[i].lora_A, 0);  // gradients have memory of their own
    }
    if (need_B) dB = in_capacity(d.B[i], group[i].lora_B, 1);
    if (member.E.defined() && need_E) dE = in_capacity(d.E[i], *group[i].lora_E, 0);
  }
  return result;
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_lora_linear_group_forward", &rankwise::group_forward<rankwise::group_forward_cpu>);
  m.impl("_lora_linear_group_backward", &rankwise::group_backward<rankwise::group_backward_cpu>);
}
