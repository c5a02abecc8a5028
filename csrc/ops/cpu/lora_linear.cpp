// lora_linear on the CPU: in panels where they serve, else on ATen's products; and what is trained
// of the base.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dispatch.h"
#include "../dropout.h"
#include "../matrices.h"
#include "adapter.h"
#include "base_term.h"
#include "blocks.h"
#include "dropout.h"
#include "lora_linear_aten.h"
#include "lora_linear_panels.h"
#include "micro_kernel.h"
#include "path_choice.h"
#include "products.h"

namespace rankwise {
namespace {

ForwardResult lora_linear_forward_cpu(const at::Tensor& input, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias,
                                      const AdapterOperands& operands) {
  check_lora_linear("lora_linear", input, weight, bias, operands);
  const at::Tensor seed = draw_seed_cpu(Dropout(operands.dropout_p));
  const ActiveAdapter adapter(operands, seed);
  const at::Tensor x = matrix(input);
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = weight.size(0);
  const BaseTerm base{weight, bias.value_or(at::Tensor()), {}};
  const auto [y, hidden] = on_cpu_path(Pass::forward, adapter, x, [&](bool panels) {
    return panels ? forward_in_panels(adapter, x, base) : forward_on_aten(adapter, x, base);
  });
  return {in_shape(y, shape), hidden, seed};
}

at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x) {
  const at::Tensor dw = at::empty({dy.size(1), x.size(1)}, dy.options());
  const std::vector<Tile> tiles = output_tiles(dw, dy.size(0));
  run_blocks(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    multiply_into(tiles[i].of(dw), tiles[i].row.of(dy, 1).t(), tiles[i].col.of(x, 1), 1.0);
  });
  return dw;
}

at::Tensor bias_gradient(const at::Tensor& dy) {
  const at::Tensor db = at::empty({dy.size(1)}, dy.options());
  const Split cols(dy.size(1), scratch_step(dy.size(0)));
  run_blocks(cols.count(), [&](int64_t i) {
    at::Tensor out = cols[i].of(db, 0);
    at::sum_out(out, cols[i].of(dy, 1), 0);
  });
  return db;
}

BackwardResult lora_linear_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                        const at::Tensor& weight, const AdapterOperands& operands,
                                        const at::Tensor& hidden, const at::Tensor& seed,
                                        std::array<bool, 6> output_mask) {
  check_lora_linear("lora_linear", input, weight, {}, operands);
  check_backward("lora_linear", grad_output, input, operands, hidden, seed);
  const ActiveAdapter adapter(operands, seed);
  const at::Tensor dy = matrix(grad_output), x = matrix(input);
  const auto [need_x, need_w, need_b, need_A, need_B, need_E] = output_mask;
  const std::array<bool, 4> needed = {need_x, need_A, need_B, need_E};
  at::Tensor dx, dw, db, dA, dB, dE;
  if (need_w) dw = weight_gradient(dy, x);
  if (need_b) db = bias_gradient(dy);
  const FactorGradients d = on_cpu_path(Pass::backward, adapter, x, [&](bool panels) {
    return panels ? backward_in_panels(adapter, dy, x, weight, hidden, needed)
                  : backward_on_aten(adapter, dy, x, weight, hidden, needed);
  });
  if (need_x) dx = in_shape(d.x, input.sizes());
  if (need_A) dA = in_capacity(d.A, operands.lora_A, 0);
  if (need_B) dB = in_capacity(d.B, operands.lora_B, 1);
  if (need_E) dE = in_capacity(d.E, *operands.lora_E, 0);
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
