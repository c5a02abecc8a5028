// lora_linear from ATen ops: y = x W0^T + b + scaling * ((drop(x) A^T) * E^T) B^T.
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

std::string path_composite(const at::Tensor&) {
  return "composite";
}

}  // namespace

ForwardResult lora_linear_forward_composite(const at::Tensor& input, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias,
                                            const AdapterOperands& operands) {
  check_lora_linear("lora_linear", input, weight, bias, operands);
  if (input.dim() == 1) {  // at::linear under vmap gives a vector another dimension
    auto [row, row_hidden, row_seed] =
        lora_linear_forward_composite(input.unsqueeze(0), weight, bias, operands);
    return {row.squeeze(0), row_hidden, row_seed};
  }
  const Factors f(operands);
  const double dropout_p = operands.dropout_p;
  const at::Tensor seed = Dropout(dropout_p).draw_seed(input);
  const at::Tensor hidden = at::linear(dropped(input, seed, dropout_p, f.A.scalar_type()), f.A);
  const at::Tensor gated = f.E.defined() ? hidden * f.E.t() : hidden;
  const at::Tensor base = at::linear(input, weight, bias);
  const at::Tensor output =
      (base + at::linear(gated, f.B) * operands.scaling).to(input.scalar_type());
  return {output, flat(hidden), seed};
}

BackwardResult lora_linear_backward_composite(const at::Tensor& grad_output,
                                              const at::Tensor& input, const at::Tensor& weight,
                                              const AdapterOperands& operands,
                                              const at::Tensor& hidden, const at::Tensor& seed,
                                              std::array<bool, 6> output_mask) {
  check_lora_linear("lora_linear", input, weight, {}, operands);
  check_backward("lora_linear", grad_output, input, weight, operands, hidden, seed);
  const auto dtype = operands.lora_A.scalar_type();
  const c10::SymInt capacity = operands.lora_A.sym_size(0);
  const double scaling = operands.scaling, dropout_p = operands.dropout_p;
  const Factors f(operands);
  const at::Tensor dy = flat(grad_output);
  const at::Tensor x = flat(dropped(input, seed, dropout_p, dtype));
  const at::Tensor dy_adapter = dy.to(dtype);
  const at::Tensor dh_raw = dy_adapter.matmul(f.B) * scaling;
  const at::Tensor dh = f.E.defined() ? dh_raw * f.E.t() : dh_raw;

  at::Tensor dx, dw, db, da, dB, de;
  if (output_mask[0]) {
    const at::Tensor lora = dropped(dh.matmul(f.A), seed, dropout_p, dtype);
    dx = (dy.matmul(weight) + lora).to(input.scalar_type()).reshape_symint(input.sym_sizes());
  }
  if (output_mask[1]) dw = dy.t().matmul(flat(input));
  if (output_mask[2]) db = dy.sum(0);
  if (output_mask[3]) da = padded(dh.t().matmul(x), 0, capacity);
  if (output_mask[4] || output_mask[5]) {
    const at::Tensor h = x.matmul(f.A.t());
    if (output_mask[4]) {
      const at::Tensor gated = f.E.defined() ? h * f.E.t() : h;
      dB = padded(dy_adapter.t().matmul(gated) * scaling, 1, capacity);
    }
    if (output_mask[5]) de = padded((dh_raw * h).sum(0).unsqueeze(1), 0, capacity);
  }
  return {dx, dw, db, da, dB, de};
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("_lora_linear_forward",
         &rankwise::linear_forward<rankwise::lora_linear_forward_composite>);
  m.impl("_lora_linear_backward",
         &rankwise::linear_backward<rankwise::lora_linear_backward_composite>);
  m.impl("_lora_linear_path", &rankwise::path_composite);
}
