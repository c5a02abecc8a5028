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
                                       const at::Tensor& lora_A, const at::Tensor& lora_B,
                                       const std::optional<at::Tensor>& lora_E, double scaling,
                                       double dropout_p, c10::SymInt rank) {
  check_lora_linear("lora_linear", input, weight, bias, lora_A, lora_B, lora_E, scaling, dropout_p,
                    rank);
  const c10::SymInt seeds = Dropout(dropout_p).active() ? 1 : 0;
  return {output_like(input, weight), lora_A.new_empty_symint({sym_token_count(input), rank}),
          input.new_empty_symint({seeds}, input.options().dtype(at::kLong))};
}

BackwardResult lora_linear_backward_meta(const at::Tensor& grad_output, const at::Tensor& input,
                                         const at::Tensor& weight, const at::Tensor& lora_A,
                                         const at::Tensor& lora_B,
                                         const std::optional<at::Tensor>& lora_E,
                                         const at::Tensor& hidden, const at::Tensor& seed,
                                         double scaling, double dropout_p, c10::SymInt rank,
                                         std::array<bool, 6> output_mask) {
  check_lora_linear("lora_linear", input, weight, {}, lora_A, lora_B, lora_E, scaling, dropout_p,
                    rank);
  check_backward("lora_linear", grad_output, input, weight, lora_A, hidden, seed, dropout_p, rank);
  const auto when = [&](int i, const at::Tensor& like) {
    return output_mask[i] ? like.new_empty_symint(like.sym_sizes()) : at::Tensor();
  };
  at::Tensor grad_bias;
  if (output_mask[2]) grad_bias = weight.new_empty_symint({weight.sym_size(0)});
  return {when(0, input),
          when(1, weight),
          grad_bias,
          when(3, lora_A),
          when(4, lora_B),
          output_mask[5] ? lora_E->new_empty_symint(lora_E->sym_sizes()) : at::Tensor()};
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
  m.impl("_lora_linear_forward", &rankwise::lora_linear_forward_meta);
  m.impl("_lora_linear_backward", &rankwise::lora_linear_backward_meta);
  m.impl("_dropout_mask", &rankwise::dropout_mask_meta);
}
