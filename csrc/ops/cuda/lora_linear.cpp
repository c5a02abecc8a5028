// lora_linear on CUDA: the LoRA term is written first, by a kernel and with the bias in it, and the
// base product added to it (beta = 1), so y and dx are written once, read once more and the larger
// term is rounded last. Factors of float32 over a base of 16 bits are added to the base product
// instead, in float32: the term may be the larger one, and PEFT does not round it either. Large
// products of 16 bits on sm_90 can take the term into their own sums and write once
// (term_product.h).
#include "../../kernels/lora_linear.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dispatch.h"
#include "../dropout.h"
#include "../lora_linear_composite.h"
#include "../matrices.h"
#include "adapter.h"
#include "base_product.h"
#include "launch.h"
#include "layer_products.h"
#include "path.h"
#include "term_product.h"

namespace rankwise {

bool kernels_serve(const at::Tensor& input, const at::Tensor& weight, int64_t rank) {
  return input.numel() > 0 && weight.numel() > 0 && rank <= kernels::max_rank &&
         composite_reason(input.scalar_type(), input.device()).empty();
}

at::Tensor add_output(const CudaAdapter& adapter, const at::Tensor& x, const at::Tensor& w,
                      const std::optional<at::Tensor>& bias, const at::Tensor& gated) {
  const at::Tensor y = at::empty({x.size(0), w.size(0)}, x.options());
  if (adapter.rank() == 0 || adapter.type() != kernel_type(y)) {
    multiply_base(y, x, w.t(), bias);
    if (adapter.rank() > 0) expand_output(adapter, gated, y, {}, /*base=*/y);
    return y;
  }
  expand_output(adapter, gated, y, has(bias) ? bias->contiguous() : at::Tensor(), {});
  add_base(y, x, w.t());
  return y;
}

at::Tensor input_gradient(const CudaAdapter& adapter, const at::Tensor& dy, const at::Tensor& w,
                          const at::Tensor& dh, const ProductTerm& term) {
  if (term.defined()) return product_with_term(dy, w, term, {}, adapter.mask());
  const at::Tensor dx = at::empty({dy.size(0), w.size(1)}, dy.options());
  if (adapter.rank() == 0) {
    multiply_base(dx, dy, w, {});
    return dx;
  }
  expand_input(adapter, dh, dx);
  add_base(dx, dy, w);
  return dx;
}

namespace {

ForwardResult lora_linear_forward_cuda(const at::Tensor& input, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias,
                                       const AdapterOperands& operands) {
  check_lora_linear("lora_linear", input, weight, bias, operands);
  const c10::cuda::CUDAGuard guard(input.device());
  const int64_t rank = operands.active();
  if (!kernels_serve(input, weight, rank)) {
    return lora_linear_forward_composite(input, weight, bias, operands);
  }
  const at::Tensor seed = Dropout(operands.dropout_p).draw_seed(input);
  const CudaAdapter adapter(operands, seed);
  const at::Tensor x = matrix(input);
  const at::Tensor hidden = at::empty({x.size(0), rank}, adapter.A.options());
  const ProductTerm term = output_term(adapter, x, weight);
  at::Tensor y;
  if (term.beside > 0) {
    y = product_beside_shrink(adapter, x, weight, term, bias, hidden);
  } else {
    const bool apart = adapter.E.defined() && !term.defined();
    const at::Tensor gated = apart ? at::empty_like(hidden) : hidden;
    if (rank > 0) shrink(adapter, x, hidden, gated, term);
    y = term.defined() ? product_with_term(x, weight.t(), term, bias)
                       : add_output(adapter, x, weight, bias, gated);
  }
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = weight.size(0);
  return {y.view(shape), hidden, seed};
}

BackwardResult lora_linear_backward_cuda(const at::Tensor& grad_output, const at::Tensor& input,
                                         const at::Tensor& weight, const AdapterOperands& operands,
                                         const at::Tensor& hidden, const at::Tensor& seed,
                                         std::array<bool, 6> output_mask) {
  check_lora_linear("lora_linear", input, weight, {}, operands);
  check_backward("lora_linear", grad_output, input, operands, hidden, seed);
  const c10::cuda::CUDAGuard guard(input.device());
  if (!kernels_serve(input, weight, operands.active())) {
    return lora_linear_backward_composite(grad_output, input, weight, operands, hidden, seed,
                                          output_mask);
  }
  const CudaAdapter adapter(operands, seed);
  const at::Tensor dy = matrix(grad_output);
  const auto [need_x, need_w, need_b, need_A, need_B, need_E] = output_mask;
  const int64_t rank = adapter.rank();
  const at::Tensor x = need_A || need_w ? matrix(input) : at::Tensor();
  const ProductTerm term =
      need_x ? input_term(adapter, dy, weight, need_A ? x : at::Tensor()) : ProductTerm();
  const OutputSide side =
      output_side(adapter, operands, dy, hidden, {need_x, need_A, need_B, need_E}, term);
  at::Tensor dx, dw, db, dA;
  if (need_A) dA = gradient_of(operands.lora_A, operands.lora_A.size(0), rank);
  if (term.beside > 0) {
    const InputProducts both = product_beside_input_factor(adapter, dy, weight, term, x);
    dx = both.dx;
    end_input_factor_gradient(adapter, x, dA, both.slices, both.count, side.pending);
  } else {
    if (need_A && rank > 0) input_factor_gradient(adapter, x, side.d.dh, dA, side.pending);
    if (need_x) dx = input_gradient(adapter, dy, weight, side.d.dh, term);
  }
  if (need_x) dx = dx.view(input.sizes());
  if (need_w) dw = at::mm(dy.t(), x);
  if (need_b) db = at::sum(dy, 0);
  return {dx, dw, db, dA, side.d.dB, side.d.dE};
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_lora_linear_forward", &rankwise::linear_forward<rankwise::lora_linear_forward_cuda>);
  m.impl("_lora_linear_backward", &rankwise::linear_backward<rankwise::lora_linear_backward_cuda>);
}
