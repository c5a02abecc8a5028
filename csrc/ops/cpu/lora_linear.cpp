// lora_linear on the CPU: in panels where they serve, else on ATen's products; and what is trained
// of the base.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dispatch.h"
#include "../dropout.h"
#include "../matrices.h"
#include "adapter.h"
#include "base_gradients.h"
#include "base_term.h"
#include "dropout.h"
#include "lora_linear_aten.h"
#include "lora_linear_panels.h"
#include "micro_kernel.h"
#include "path_choice.h"

namespace rankwise {
namespace {

ForwardResult lora_linear_forward_cpu(const at::Tensor& input, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias,
                                      const AdapterOperands& operands) {
  check_lora_linear("lora_linear", input, weight, bias, operands);
  const at::Tensor seed = draw_seed_cpu(Dropout(operands.dropout_p));
  const AdapterGroup adapter({ActiveAdapter(operands, seed)});
  const at::Tensor x = matrix(input);
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = weight.size(0);
  const std::vector<BaseTerm> base = {{weight, bias.value_or(at::Tensor()), {}}};
  const auto [y, hidden] = on_cpu_path(Pass::forward, adapter.members[0], x, [&](bool panels) {
    return panels ? forward_in_panels(adapter, x, base) : forward_on_aten(adapter, x, base);
  });
  return {in_shape(y[0], shape), hidden, seed};
}

BackwardResult lora_linear_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                        const at::Tensor& weight, const AdapterOperands& operands,
                                        const at::Tensor& hidden, const at::Tensor& seed,
                                        std::array<bool, 6> output_mask) {
  check_lora_linear("lora_linear", input, weight, {}, operands);
  check_backward("lora_linear", grad_output, input, operands, hidden, seed);
  const AdapterGroup adapter({ActiveAdapter(operands, seed)});
  const at::Tensor dy = matrix(grad_output), x = matrix(input);
  const auto [need_x, need_w, need_b, need_A, need_B, need_E] = output_mask;
  const std::array<bool, 4> needed = {need_x, need_A, need_B, need_E};
  at::Tensor dx, dw, db, dA, dB, dE;
  if (need_w) dw = weight_gradient(dy, x);
  if (need_b) db = bias_gradient(dy);
  const std::vector<OutputTerm> output = {{dy, weight}};
  const FactorGradients d = on_cpu_path(Pass::backward, adapter.members[0], x, [&](bool panels) {
    return panels ? backward_in_panels(adapter, output, x, hidden, needed)
                  : backward_on_aten(adapter, output, x, hidden, needed);
  });
  if (need_x) dx = in_shape(d.x, input.sizes());
  if (need_A) dA = in_capacity(d.A, operands.lora_A, 0);
  if (need_B) dB = in_capacity(d.B[0], operands.lora_B, 1);
  if (need_E) dE = in_capacity(d.E[0], *operands.lora_E, 0);
  return {dx, dw, db, dA, dB, dE};
}

std::string path_cpu(const at::Tensor& tensor, at::IntArrayRef) {
  if (!micro_kernel_serves(tensor.scalar_type())) return "cpu (ATen)";
  return std::string("cpu (") + name_of(path_in_effect()) + ")";
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_lora_linear_forward", &rankwise::linear_forward<rankwise::lora_linear_forward_cpu>);
  m.impl("_lora_linear_backward", &rankwise::linear_backward<rankwise::lora_linear_backward_cpu>);
  m.impl("_lora_linear_path", &rankwise::path_cpu);
}
