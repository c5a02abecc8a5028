// lora_linear: the public C++ function, the typed dispatcher calls, and the kernel of the public
// op below autograd (which keeps the output of the forward op and drops the rest).
#include <rankwise/ops.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatch.h"
#include "find_op.h"

namespace rankwise {
namespace {

at::Tensor lora_linear_below_autograd(const at::Tensor& input, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias,
                                      const at::Tensor& lora_A, const at::Tensor& lora_B,
                                      const std::optional<at::Tensor>& lora_E, double scaling,
                                      double dropout_p, std::optional<c10::SymInt> rank) {
  const c10::SymInt active = active_rank("lora_linear", lora_A, weight.sym_size(-1), rank);
  return std::get<0>(lora_linear_forward(input, weight, bias,
                                         {lora_A, lora_B, lora_E, scaling, dropout_p, active}));
}

}  // namespace

at::Tensor lora_linear(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, const at::Tensor& lora_A,
                       const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                       double scaling, double dropout_p, std::optional<int64_t> rank) {
  static const auto op = find_op<decltype(lora_linear_below_autograd)>("rankwise::lora_linear");
  std::optional<c10::SymInt> symbolic_rank;
  if (rank) symbolic_rank = *rank;
  return op.call(input, weight, bias, lora_A, lora_B, lora_E, scaling, dropout_p, symbolic_rank);
}

ForwardResult lora_linear_forward(const at::Tensor& input, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias,
                                  const AdapterOperands& adapter) {
  static const auto op =
      find_op<decltype(linear_forward<lora_linear_forward>)>("rankwise::_lora_linear_forward");
  const auto& [lora_A, lora_B, lora_E, scaling, dropout_p, rank] = adapter;
  return op.call(input, weight, bias, lora_A, lora_B, lora_E, scaling, dropout_p, rank);
}

BackwardResult lora_linear_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                    const at::Tensor& weight, const AdapterOperands& adapter,
                                    const at::Tensor& hidden, const at::Tensor& seed,
                                    std::array<bool, 6> output_mask) {
  static const auto op =
      find_op<decltype(linear_backward<lora_linear_backward>)>("rankwise::_lora_linear_backward");
  const auto& [lora_A, lora_B, lora_E, scaling, dropout_p, rank] = adapter;
  return op.call(grad_output, input, weight, lora_A, lora_B, lora_E, hidden, seed, scaling,
                 dropout_p, rank, output_mask);
}

at::Tensor dropout_mask(const at::Tensor& seed, c10::SymInt rows, c10::SymInt cols,
                        double dropout_p, at::ScalarType dtype) {
  static const auto op = find_op<decltype(dropout_mask)>("rankwise::_dropout_mask");
  return op.call(seed, std::move(rows), std::move(cols), dropout_p, dtype);
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", &rankwise::lora_linear_below_autograd);
}
