// Shapes of the ops' results, for torch.compile and export: symbolic sizes stay symbolic.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatch.h"
#include "dropout.h"

namespace rankwise {
namespace {

at::Tensor output_like(const at::Tensor& input, const at::Tensor& weight) {
  auto shape = input.sym_sizes().vec();
  shape.back() = weight.sym_size(0);
  return input.new_empty_symint(shape);
}

ForwardResult lora_linear_forward_meta(const at::Tensor& input, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias,
                                       const AdapterOperands& operands) {
  check_lora_linear("lora_linear", input, weight, bias, operands);
  const c10::SymInt seeds = Dropout(operands.dropout_p).active() ? 1 : 0;
  return {output_like(input, weight),
          operands.lora_A.new_empty_symint({sym_token_count(input), operands.rank}),
          input.new_empty_symint({seeds}, input.options().dtype(at::kLong))};
}

BackwardResult lora_linear_backward_meta(const at::Tensor& grad_output, const at::Tensor& input,
                                         const at::Tensor& weight, const AdapterOperands& operands,
                                         const at::Tensor& hidden, const at::Tensor& seed,
                                         std::array<bool, 6> output_mask) {
  check_lora_linear("lora_linear", input, weight, {}, operands);
  check_backward("lora_linear", grad_output, input, operands, hidden, seed);
  const auto when = [&](int i, const at::Tensor& like) {
    return output_mask[i] ? like.new_empty_symint(like.sym_sizes()) : at::Tensor();
  };
  at::Tensor grad_bias, grad_E;
  if (output_mask[2]) grad_bias = weight.new_empty_symint({weight.sym_size(0)});
  if (output_mask[5]) grad_E = when(5, *operands.lora_E);
  return {when(0, input),           when(1, weight),          grad_bias,
          when(3, operands.lora_A), when(4, operands.lora_B), grad_E};
}

at::Tensor dropout_mask_meta(const at::Tensor& seed, c10::SymInt rows, c10::SymInt cols,
                             double dropout_p, at::ScalarType dtype) {
  check_dropout_p("_dropout_mask", dropout_p);
  check_seed("_dropout_mask", seed, dropout_p);
  return seed.new_empty_symint({rows, cols}, seed.options().dtype(dtype));
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, Meta, m) {
  m.impl("_lora_linear_forward", &rankwise::linear_forward<rankwise::lora_linear_forward_meta>);
  m.impl("_lora_linear_backward", &rankwise::linear_backward<rankwise::lora_linear_backward_meta>);
  m.impl("_dropout_mask", &rankwise::dropout_mask_meta);
}
