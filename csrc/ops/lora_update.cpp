// lora_update: the public C++ function, the typed dispatcher calls, and the kernel of the public op
// below autograd.
#include <rankwise/ops.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatch.h"
#include "find_op.h"

namespace rankwise {
namespace {

at::Tensor lora_update_below_autograd(const at::Tensor& base_output, const at::Tensor& input,
                                      const at::Tensor& lora_A, const at::Tensor& lora_B,
                                      const std::optional<at::Tensor>& lora_E, double scaling,
                                      double dropout_p, std::optional<c10::SymInt> rank) {
  const c10::SymInt active = active_rank("lora_update", lora_A, input.sym_size(-1), rank);
  return std::get<0>(lora_update_forward(base_output, input,
                                         {lora_A, lora_B, lora_E, scaling, dropout_p, active}));
}

}  // namespace

at::Tensor lora_update(const at::Tensor& base_output, const at::Tensor& input,
                       const at::Tensor& lora_A, const at::Tensor& lora_B,
                       const std::optional<at::Tensor>& lora_E, double scaling, double dropout_p,
                       std::optional<int64_t> rank) {
  static const auto op = find_op<decltype(lora_update_below_autograd)>("rankwise::lora_update");
  std::optional<c10::SymInt> symbolic_rank;
  if (rank) symbolic_rank = *rank;
  return op.call(base_output, input, lora_A, lora_B, lora_E, scaling, dropout_p, symbolic_rank);
}

ForwardResult lora_update_forward(const at::Tensor& base_output, const at::Tensor& input,
                                  const AdapterOperands& adapter) {
  static const auto op =
      find_op<decltype(update_forward<lora_update_forward>)>("rankwise::_lora_update_forward");
  const auto& [lora_A, lora_B, lora_E, scaling, dropout_p, rank] = adapter;
  return op.call(base_output, input, lora_A, lora_B, lora_E, scaling, dropout_p, rank);
}

UpdateBackwardResult lora_update_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                          const AdapterOperands& adapter, const at::Tensor& hidden,
                                          const at::Tensor& seed, std::array<bool, 4> output_mask) {
  static const auto op =
      find_op<decltype(update_backward<lora_update_backward>)>("rankwise::_lora_update_backward");
  const auto& [lora_A, lora_B, lora_E, scaling, dropout_p, rank] = adapter;
  return op.call(grad_output, input, lora_A, lora_B, lora_E, hidden, seed, scaling, dropout_p, rank,
                 output_mask);
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("lora_update", &rankwise::lora_update_below_autograd);
}
