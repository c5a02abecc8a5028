// Shapes of lora_update's results, for torch.compile and export: symbolic sizes stay symbolic.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatch.h"
#include "dropout.h"

namespace rankwise {
namespace {

ForwardResult lora_update_forward_meta(const at::Tensor& base_output, const at::Tensor& input,
                                       const AdapterOperands& operands) {
  check_lora_update("lora_update", base_output, input, operands);
  const c10::SymInt seeds = Dropout(operands.dropout_p).active() ? 1 : 0;
  return {base_output.new_empty_symint(base_output.sym_sizes()),
          operands.lora_A.new_empty_symint({sym_token_count(input), operands.rank}),
          input.new_empty_symint({seeds}, input.options().dtype(at::kLong))};
}

UpdateBackwardResult lora_update_backward_meta(const at::Tensor& grad_output,
                                               const at::Tensor& input,
                                               const AdapterOperands& operands,
                                               const at::Tensor& hidden, const at::Tensor& seed,
                                               std::array<bool, 4> output_mask) {
  check_lora_update("lora_update", {}, input, operands);
  check_backward("lora_update", grad_output, input, operands, hidden, seed);
  const auto when = [&](int i, const at::Tensor& like) {
    return output_mask[i] ? like.new_empty_symint(like.sym_sizes()) : at::Tensor();
  };
  at::Tensor dE;
  if (output_mask[3]) dE = when(3, *operands.lora_E);
  return {when(0, input), when(1, operands.lora_A), when(2, operands.lora_B), dE};
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, Meta, m) {
  m.impl("_lora_update_forward", &rankwise::update_forward<rankwise::lora_update_forward_meta>);
  m.impl("_lora_update_backward", &rankwise::update_backward<rankwise::lora_update_backward_meta>);
}
