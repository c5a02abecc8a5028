// lora_update's gradient: one node that saves x by reference, `hidden` and the dropout seed.
// base_output's gradient is the output's.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "differentiation.h"
#include "dispatch.h"
#include "lora_linear_composite.h"

namespace rankwise {
// A named namespace would let another library's class of the same name replace this one at run
// time.
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class LoraUpdateFunction : public torch::autograd::Function<LoraUpdateFunction> {
 public:
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& base_output,
                            const at::Tensor& input, const at::Tensor& lora_A,
                            const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                            double scaling, double dropout_p, const c10::SymInt& rank) {
    auto [output, hidden, seed] = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return lora_update_forward(base_output, input,
                                 {lora_A, lora_B, lora_E, scaling, dropout_p, rank});
    }();
    ctx->save_for_backward({input, lora_A, lora_B, lora_E.value_or(at::Tensor()), hidden, seed});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<at::Tensor> lora_E =
        saved[3].defined() ? std::optional(saved[3]) : std::nullopt;
    // The graph's edges: base_output, input, A, B, and E where there is one.
    const std::array<bool, 4> output_mask = {ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                             ctx->needs_input_grad(3),
                                             has(lora_E) && ctx->needs_input_grad(4)};
    auto [dx, dA, dB, dE] = lora_update_backward(
        grad_outputs[0], saved[0],
        {saved[1], saved[2], lora_E, ctx->saved_data["scaling"].toDouble(),
         ctx->saved_data["dropout_p"].toDouble(), /*rank=*/saved[4].sym_size(1)},
        saved[4], saved[5], output_mask);
    return {grad_outputs[0], dx, dA, dB, dE, {}, {}, {}};
  }
};

at::Tensor lora_update_autograd(const at::Tensor& base_output, const at::Tensor& input,
                                const at::Tensor& lora_A, const at::Tensor& lora_B,
                                const std::optional<at::Tensor>& lora_E, double scaling,
                                double dropout_p, std::optional<c10::SymInt> rank) {
  TORCH_CHECK(input.dim() >= 1, "lora_update: input must be [..., in_features], got a scalar");
  const c10::SymInt active = active_rank("lora_update", lora_A, input.sym_size(-1), rank);
  if (beyond_nodes(base_output, input, lora_A, lora_B, lora_E)) {
    return std::get<0>(lora_update_forward_composite(
        base_output, input, {lora_A, lora_B, lora_E, scaling, dropout_p, active}));
  }
  return LoraUpdateFunction::apply(base_output, input, lora_A, lora_B, lora_E, scaling, dropout_p,
                                   active);
}

// Double backward: the gradients as a differentiable formula when somebody records them.
UpdateBackwardResult lora_update_backward_autograd(const at::Tensor& grad_output,
                                                   const at::Tensor& input,
                                                   const AdapterOperands& operands,
                                                   const at::Tensor& hidden, const at::Tensor& seed,
                                                   std::array<bool, 4> output_mask) {
  if (recorded(grad_output, input, operands.lora_A, operands.lora_B, operands.lora_E)) {
    return lora_update_backward_composite(grad_output, input, operands, hidden, seed, output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return lora_update_backward(grad_output, input, operands, hidden, seed, output_mask);
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, Autograd, m) {
  m.impl("lora_update", &rankwise::lora_update_autograd);
  m.impl("_lora_update_backward",
         &rankwise::update_backward<rankwise::lora_update_backward_autograd>);
  // The forward's other outputs have no gradient of their own: an error, not a silent zero.
  m.impl("_lora_update_forward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(rankwise, FuncTorchBatchedDecomposition, m) {
  m.impl("lora_update", &rankwise::lora_update_autograd);
}
