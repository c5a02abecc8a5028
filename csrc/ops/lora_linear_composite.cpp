// lora_update and lora_linear from ATen ops: y = base + scaling * ((drop(x) A^T) * E^T) B^T, and
// with base = x W0^T + b.
#include "lora_linear_composite.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "dropout.h"
#include "matrices.h"

namespace rankwise {
namespace {

// The active directions: A [rank, in], B [out, rank], E [rank, 1].
struct Factors {
  at::Tensor A, B, E;

  explicit Factors(const AdapterOperands& of)
      : A(of.lora_A.narrow_symint(0, 0, of.rank)),
        B(of.lora_B.narrow_symint(1, 0, of.rank)),
        E(has(of.lora_E) ? of.lora_E->narrow_symint(0, 0, of.rank) : at::Tensor()) {}
};

// drop(x) in the adapter's dtype, for any leading dimensions of x.
at::Tensor dropped(const at::Tensor& x, const at::Tensor& seed, double dropout_p,
                   at::ScalarType dtype) {
  const Dropout dropout(dropout_p);
  const at::Tensor cast = x.to(dtype);
  if (!dropout.active()) return cast;
  const c10::SymInt cols = x.sym_size(-1);
  const at::Tensor mask = dropout_mask(seed, sym_token_count(x), cols, dropout_p, dtype);
  return cast * mask.view_symint(x.sym_sizes()) * dropout.keep_scale();
}

at::Tensor flat(const at::Tensor& tensor) {
  return tensor.reshape_symint({sym_token_count(tensor), tensor.sym_size(-1)});
}

// Gradients of an adapter's input and factors, from dy [tokens, out] in the adapter's dtype.
struct AdapterGradients {
  at::Tensor x, A, B, E;  // x [tokens, in], in the adapter's dtype

  AdapterGradients(const at::Tensor& dy, const at::Tensor& input, const AdapterOperands& of,
                   const at::Tensor& seed, std::array<bool, 4> output_mask) {
    const auto [need_x, need_A, need_B, need_E] = output_mask;
    const c10::SymInt capacity = of.lora_A.sym_size(0);
    const Factors f(of);
    const at::Tensor mask_x = flat(dropped(input, seed, of.dropout_p, dy.scalar_type()));
    const at::Tensor dh_raw = dy.matmul(f.B) * of.scaling;
    const at::Tensor dh = f.E.defined() ? dh_raw * f.E.t() : dh_raw;
    if (need_x) x = dropped(dh.matmul(f.A), seed, of.dropout_p, dy.scalar_type());
    if (need_A) A = padded(dh.t().matmul(mask_x), 0, capacity);
    if (!need_B && !need_E) return;
    const at::Tensor h = mask_x.matmul(f.A.t());
    if (need_B) {
      const at::Tensor gated = f.E.defined() ? h * f.E.t() : h;
      B = padded(dy.t().matmul(gated) * of.scaling, 1, capacity);
    }
    if (need_E) E = padded((dh_raw * h).sum(0).unsqueeze(1), 0, capacity);
  }
};

// The output and `hidden`.
std::pair<at::Tensor, at::Tensor> updated(const at::Tensor& base, const at::Tensor& input,
                                          const AdapterOperands& operands, const at::Tensor& seed) {
  const Factors f(operands);
  const at::Tensor hidden =
      at::linear(dropped(input, seed, operands.dropout_p, f.A.scalar_type()), f.A);
  const at::Tensor gated = f.E.defined() ? hidden * f.E.t() : hidden;
  const at::Tensor update = at::linear(gated, f.B) * operands.scaling;
  return {(base + update).to(input.scalar_type()), flat(hidden)};
}

std::string path_composite(const at::Tensor&, at::IntArrayRef) {
  return "composite";
}

}  // namespace

ForwardResult lora_update_forward_composite(const at::Tensor& base_output, const at::Tensor& input,
                                            const AdapterOperands& operands) {
  check_lora_update("lora_update", base_output, input, operands);
  if (input.dim() == 1) {  // at::linear under vmap gives a vector another dimension
    auto [row, row_hidden, row_seed] =
        lora_update_forward_composite(base_output.unsqueeze(0), input.unsqueeze(0), operands);
    return {row.squeeze(0), row_hidden, row_seed};
  }
  const at::Tensor seed = Dropout(operands.dropout_p).draw_seed(input);
  const auto [output, hidden] = updated(base_output, input, operands, seed);
  return {output, hidden, seed};
}

UpdateBackwardResult lora_update_backward_composite(
    const at::Tensor& grad_output, const at::Tensor& input, const AdapterOperands& operands,
    const at::Tensor& hidden, const at::Tensor& seed, std::array<bool, 4> output_mask) {
  check_lora_update("lora_update", {}, input, operands);
  check_backward("lora_update", grad_output, input, operands, hidden, seed);
  const at::Tensor dy = flat(grad_output).to(operands.lora_A.scalar_type());
  const AdapterGradients d(dy, input, operands, seed, output_mask);
  at::Tensor dx;
  if (d.x.defined()) dx = d.x.to(input.scalar_type()).reshape_symint(input.sym_sizes());
  return {dx, d.A, d.B, d.E};
}

ForwardResult lora_linear_forward_composite(const at::Tensor& input, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias,
                                            const AdapterOperands& operands) {
  check_lora_linear("lora_linear", input, weight, bias, operands);
  const at::Tensor seed = Dropout(operands.dropout_p).draw_seed(input);
  const auto [output, hidden] = lora_linear_of_seed(input, weight, bias, operands, seed);
  return {output, hidden, seed};
}

std::pair<at::Tensor, at::Tensor> lora_linear_of_seed(const at::Tensor& input,
                                                      const at::Tensor& weight,
                                                      const std::optional<at::Tensor>& bias,
                                                      const AdapterOperands& operands,
                                                      const at::Tensor& seed) {
  if (input.dim() == 1) {
    auto [row, hidden] = lora_linear_of_seed(input.unsqueeze(0), weight, bias, operands, seed);
    return {row.squeeze(0), hidden};
  }
  return updated(at::linear(input, weight, bias), input, operands, seed);
}

BackwardResult lora_linear_backward_composite(const at::Tensor& grad_output,
                                              const at::Tensor& input, const at::Tensor& weight,
                                              const AdapterOperands& operands,
                                              const at::Tensor& hidden, const at::Tensor& seed,
                                              std::array<bool, 6> output_mask) {
  check_lora_linear("lora_linear", input, weight, {}, operands);
  check_backward("lora_linear", grad_output, input, operands, hidden, seed);
  const auto [need_x, need_w, need_b, need_A, need_B, need_E] = output_mask;
  const at::Tensor dy = flat(grad_output);
  const AdapterGradients d(dy.to(operands.lora_A.scalar_type()), input, operands, seed,
                           {need_x, need_A, need_B, need_E});
  at::Tensor dx, dw, db;
  if (need_x) {
    dx = (dy.matmul(weight) + d.x).to(input.scalar_type()).reshape_symint(input.sym_sizes());
  }
  if (need_w) dw = dy.t().matmul(flat(input));
  if (need_b) db = dy.sum(0);
  return {dx, dw, db, d.A, d.B, d.E};
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("_lora_linear_forward",
         &rankwise::linear_forward<rankwise::lora_linear_forward_composite>);
  m.impl("_lora_linear_backward",
         &rankwise::linear_backward<rankwise::lora_linear_backward_composite>);
  m.impl("_lora_update_forward",
         &rankwise::update_forward<rankwise::lora_update_forward_composite>);
  m.impl("_lora_update_backward",
         &rankwise::update_backward<rankwise::lora_update_backward_composite>);
  m.impl("_lora_linear_path", &rankwise::path_composite);
}
