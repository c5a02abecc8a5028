// lora_embedding's gradient: one node that saves its tensors by reference, and `hidden`.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "differentiation.h"
#include "dispatch.h"
#include "lora_embedding_composite.h"

namespace rankwise {
// A named namespace would let another library's class of the same name replace this one at run
// time.
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class LoraEmbeddingFunction : public torch::autograd::Function<LoraEmbeddingFunction> {
 public:
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& indices,
                            const at::Tensor& weight, const at::Tensor& lora_A,
                            const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                            double scaling, int64_t padding_idx, const c10::SymInt& rank) {
    auto [output, hidden] = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return lora_embedding_forward(indices, weight, {lora_A, lora_B, lora_E, scaling, 0.0, rank},
                                    padding_idx);
    }();
    ctx->save_for_backward(
        {indices, weight, lora_A, lora_B, lora_E.value_or(at::Tensor()), hidden});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["rank"] = rank;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<at::Tensor> lora_E =
        saved[4].defined() ? std::optional(saved[4]) : std::nullopt;
    // The graph's edges: indices, weight, A, B, and E where there is one.
    const std::array<bool, 4> output_mask = {ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                             ctx->needs_input_grad(3),
                                             has(lora_E) && ctx->needs_input_grad(4)};
    auto [dw, dA, dB, dE] =
        lora_embedding_backward(grad_outputs[0], saved[0], saved[1],
                                {saved[2], saved[3], lora_E, ctx->saved_data["scaling"].toDouble(),
                                 0.0, ctx->saved_data["rank"].toSymInt()},
                                saved[5], ctx->saved_data["padding_idx"].toInt(), output_mask);
    return {{}, dw, dA, dB, dE, {}, {}, {}};
  }
};

at::Tensor lora_embedding_autograd(const at::Tensor& indices, const at::Tensor& weight,
                                   const at::Tensor& lora_A, const at::Tensor& lora_B,
                                   const std::optional<at::Tensor>& lora_E, double scaling,
                                   int64_t padding_idx, std::optional<c10::SymInt> rank) {
  check_table("lora_embedding", indices, weight);
  const c10::SymInt active = active_rank("lora_embedding", lora_A, weight.sym_size(0), rank);
  if (beyond_nodes(weight, lora_A, lora_B, lora_E)) {
    return std::get<0>(lora_embedding_forward_composite(
        indices, weight, {lora_A, lora_B, lora_E, scaling, 0.0, active}, padding_idx));
  }
  return LoraEmbeddingFunction::apply(indices, weight, lora_A, lora_B, lora_E, scaling, padding_idx,
                                      active);
}

// Double backward: the gradients as a differentiable formula when somebody records them.
EmbeddingBackwardResult lora_embedding_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
    const AdapterOperands& operands, const at::Tensor& hidden, int64_t padding_idx,
    std::array<bool, 4> output_mask) {
  if (recorded(grad_output, weight, operands.lora_A, operands.lora_B, operands.lora_E)) {
    return lora_embedding_backward_composite(grad_output, indices, weight, operands, hidden,
                                             padding_idx, output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return lora_embedding_backward(grad_output, indices, weight, operands, hidden, padding_idx,
                                 output_mask);
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, Autograd, m) {
  m.impl("lora_embedding", &rankwise::lora_embedding_autograd);
  m.impl("_lora_embedding_backward",
         &rankwise::embedding_backward<rankwise::lora_embedding_backward_autograd>);
  // `hidden` has no gradient of its own: an error, not a silent zero.
  m.impl("_lora_embedding_forward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(rankwise, FuncTorchBatchedDecomposition, m) {
  m.impl("lora_embedding", &rankwise::lora_embedding_autograd);
}
