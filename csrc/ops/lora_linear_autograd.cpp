// lora_linear's gradient: one node that saves x by reference, `hidden` and the dropout seed.
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

class LoraLinearFunction : public torch::autograd::Function<LoraLinearFunction> {
 public:
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const at::Tensor& lora_A,
                            const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                            double scaling, double dropout_p, const c10::SymInt& rank) {
    auto [output, hidden, seed] = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return lora_linear_forward(input, weight, bias,
                                 {lora_A, lora_B, lora_E, scaling, dropout_p, rank});
    }();
    ctx->save_for_backward(
        {input, weight, lora_A, lora_B, lora_E.value_or(at::Tensor()), hidden, seed});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["has_bias"] = has(bias);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<at::Tensor> lora_E =
        saved[4].defined() ? std::optional(saved[4]) : std::nullopt;
    // Absent optional tensors have no edge in the graph, so edges are counted over present ones.
    const std::array<bool, 6> present = {true, true, ctx->saved_data["has_bias"].toBool(),
                                         true, true, has(lora_E)};
    std::array<bool, 6> output_mask{};
    for (size_t i = 0, edge = 0; i < present.size(); ++i) {
      if (present[i]) output_mask[i] = ctx->needs_input_grad(edge++);
    }
    auto [dx, dw, db, dA, dB, dE] = lora_linear_backward(
        grad_outputs[0], saved[0], saved[1],
        {saved[2], saved[3], lora_E, ctx->saved_data["scaling"].toDouble(),
         ctx->saved_data["dropout_p"].toDouble(), /*rank=*/saved[5].sym_size(1)},
        saved[5], saved[6], output_mask);
    return {dx, dw, db, dA, dB, dE, {}, {}, {}};
  }
};

at::Tensor lora_linear_autograd(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& lora_A,
                                const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                                double scaling, double dropout_p, std::optional<c10::SymInt> rank) {
  const c10::SymInt active = active_rank("lora_linear", lora_A, weight.sym_size(-1), rank);
  if (beyond_nodes(input, weight, bias, lora_A, lora_B, lora_E)) {
    return std::get<0>(lora_linear_forward_composite(
        input, weight, bias, {lora_A, lora_B, lora_E, scaling, dropout_p, active}));
  }
  return LoraLinearFunction::apply(input, weight, bias, lora_A, lora_B, lora_E, scaling, dropout_p,
                                   active);
}

// Double backward: the gradients as a differentiable formula when somebody records them.
BackwardResult lora_linear_backward_autograd(const at::Tensor& grad_output, const at::Tensor& input,
                                             const at::Tensor& weight,
                                             const AdapterOperands& operands,
                                             const at::Tensor& hidden, const at::Tensor& seed,
                                             std::array<bool, 6> output_mask) {
  if (recorded(grad_output, input, weight, operands.lora_A, operands.lora_B, operands.lora_E)) {
    return lora_linear_backward_composite(grad_output, input, weight, operands, hidden, seed,
                                          output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return lora_linear_backward(grad_output, input, weight, operands, hidden, seed, output_mask);
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, Autograd, m) {
  m.impl("lora_linear", &rankwise::lora_linear_autograd);
  m.impl("_lora_linear_backward",
         &rankwise::linear_backward<rankwise::lora_linear_backward_autograd>);
  // The forward's other outputs have no gradient of their own: an error, not a silent zero.
  m.impl("_lora_linear_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("merged_weight", torch::autograd::autogradNotImplementedFallback());
  m.impl("_dropout_mask", torch::CppFunction::makeFallthrough());
  m.impl("_lora_linear_path", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(rankwise, FuncTorchBatchedDecomposition, m) {
  m.impl("lora_linear", &rankwise::lora_linear_autograd);
}
