// lora_update on the CPU: lora_linear without a base's product.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dispatch.h"
#include "../dropout.h"
#include "../matrices.h"
#include "adapter.h"
#include "base_term.h"
#include "dropout.h"
#include "lora_linear_aten.h"
#include "lora_linear_panels.h"
#include "path_choice.h"

namespace rankwise {
namespace {

// A path is measured where there is a base's product, which takes the time.
bool on_panels(const AdapterGroup& adapter, const at::Tensor& x) {
  return path_in_effect() != CpuPath::aten && in_panels(x, adapter.members[0]);
}

ForwardResult lora_update_forward_cpu(const at::Tensor& base_output, const at::Tensor& input,
                                      const AdapterOperands& operands) {
  check_lora_update("lora_update", base_output, input, operands);
  const at::Tensor seed = draw_seed_cpu(Dropout(operands.dropout_p));
  const AdapterGroup adapter({ActiveAdapter(operands, seed)});
  const at::Tensor x = matrix(input);
  const std::vector<BaseTerm> base = {{{}, {}, matrix(base_output)}};
  const auto [y, hidden] = on_panels(adapter, x) ? forward_in_panels(adapter, x, base)
                                                 : forward_on_aten(adapter, x, base);
  return {in_shape(y[0], base_output.sizes()), hidden, seed};
}

UpdateBackwardResult lora_update_backward_cpu(const at::Tensor& grad_output,
                                              const at::Tensor& input,
                                              const AdapterOperands& operands,
                                              const at::Tensor& hidden, const at::Tensor& seed,
                                              std::array<bool, 4> output_mask) {
  check_lora_update("lora_update", {}, input, operands);
  check_backward("lora_update", grad_output, input, operands, hidden, seed);
  const AdapterGroup adapter({ActiveAdapter(operands, seed)});
  const at::Tensor dy = matrix(grad_output), x = matrix(input);
  const auto [need_x, need_A, need_B, need_E] = output_mask;
  const std::vector<OutputTerm> output = {{dy, {}}};
  const FactorGradients d = on_panels(adapter, x)
                                ? backward_in_panels(adapter, output, x, hidden, output_mask)
                                : backward_on_aten(adapter, output, x, hidden, output_mask);
  at::Tensor dx, dA, dB, dE;
  if (need_x) dx = in_shape(d.x, input.sizes());
  if (need_A) dA = in_capacity(d.A, operands.lora_A, 0);
  if (need_B) dB = in_capacity(d.B[0], operands.lora_B, 1);
  if (need_E) dE = in_capacity(d.E[0], *operands.lora_E, 0);
  return {dx, dA, dB, dE};
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_lora_update_forward", &rankwise::update_forward<rankwise::lora_update_forward_cpu>);
  m.impl("_lora_update_backward", &rankwise::update_backward<rankwise::lora_update_backward_cpu>);
}
