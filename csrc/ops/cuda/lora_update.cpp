// lora_update on CUDA: lora_linear's passes without a base's product; y is written once, on top of
// the base's rows, and rounded once.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dispatch.h"
#include "../dropout.h"
#include "../lora_linear_composite.h"
#include "../matrices.h"
#include "adapter.h"
#include "path.h"

namespace rankwise {
namespace {

// Everything else takes the composite form, also rank 0, for which there is nothing to compute.
bool kernels_serve(const at::Tensor& input, const AdapterOperands& operands) {
  const int64_t rank = operands.active();
  return input.numel() > 0 && operands.lora_B.numel() > 0 && rank > 0 &&
         rank <= kernels::max_rank && composite_reason(input.scalar_type(), input.device()).empty();
}

ForwardResult lora_update_forward_cuda(const at::Tensor& base_output, const at::Tensor& input,
                                       const AdapterOperands& operands) {
  check_lora_update("lora_update", base_output, input, operands);
  const c10::cuda::CUDAGuard guard(input.device());
  if (!kernels_serve(input, operands)) {
    return lora_update_forward_composite(base_output, input, operands);
  }
  const at::Tensor seed = Dropout(operands.dropout_p).draw_seed(input);
  const CudaAdapter adapter(operands, seed);
  const at::Tensor x = matrix(input), base = matrix(base_output);
  const at::Tensor hidden = at::empty({x.size(0), adapter.rank()}, adapter.A.options());
  const at::Tensor gated = adapter.E.defined() ? at::empty_like(hidden) : hidden;
  shrink(adapter, x, hidden, gated);
  const at::Tensor y = at::empty(base.sizes(), base.options());
  expand_output(adapter, gated, y, {}, base);
  return {y.view(base_output.sizes()), hidden, seed};
}

UpdateBackwardResult lora_update_backward_cuda(const at::Tensor& grad_output,
                                               const at::Tensor& input,
                                               const AdapterOperands& operands,
                                               const at::Tensor& hidden, const at::Tensor& seed,
                                               std::array<bool, 4> output_mask) {
  check_lora_update("lora_update", {}, input, operands);
  check_backward("lora_update", grad_output, input, operands, hidden, seed);
  const c10::cuda::CUDAGuard guard(input.device());
  if (!kernels_serve(input, operands)) {
    return lora_update_backward_composite(grad_output, input, operands, hidden, seed, output_mask);
  }
  const CudaAdapter adapter(operands, seed);
  const at::Tensor dy = matrix(grad_output);
  const ParameterGradients d =
      parameter_gradients(adapter, operands, dy, input, hidden, output_mask);
  at::Tensor dx;
  if (output_mask[0]) {
    dx = at::empty(input.sizes(), input.options());
    expand_input(adapter, d.dh, dx.view({dy.size(0), input.size(-1)}));
  }
  return {dx, d.A, d.B, d.E};
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_lora_update_forward", &rankwise::update_forward<rankwise::lora_update_forward_cuda>);
  m.impl("_lora_update_backward", &rankwise::update_backward<rankwise::lora_update_backward_cuda>);
}
