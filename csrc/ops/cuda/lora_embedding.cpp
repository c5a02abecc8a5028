// lora_embedding on CUDA: a gather of hidden, one pass that adds the update to the table's rows,
// and a backward that reads dy once and sums the columns of dA in a fixed order.
#include "../../kernels/lora_embedding.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dispatch.h"
#include "../lora_embedding_composite.h"
#include "adapter.h"
#include "launch.h"
#include "path.h"

namespace rankwise {
namespace {

// Everything else takes the composite form, also tables that would have to be copied first.
bool kernels_serve(const at::Tensor& indices, const at::Tensor& weight, int64_t rank) {
  return indices.numel() > 0 && weight.numel() > 0 && weight.stride(1) == 1 && rank > 0 &&
         rank <= kernels::max_rank &&
         composite_reason(weight.scalar_type(), weight.device()).empty();
}

kernels::RowIndices row_indices(const at::Tensor& indices, const at::Tensor& weight) {
  return {indices.const_data_ptr(), indices.scalar_type() == at::kLong, weight.size(0)};
}

// hidden = A^T[indices], and gated = hidden o E^T where there is an E.
void gather(const CudaAdapter& adapter, const kernels::RowIndices& indices,
            const at::Tensor& hidden, const at::Tensor& gated) {
  check_launch(kernels::launch_gather(
      {hidden.size(0), adapter.rank(), adapter.type(), indices, adapter.A.const_data_ptr(),
       adapter.A.stride(0), adapter.gate(), hidden.mutable_data_ptr(),
       adapter.E.defined() ? gated.mutable_data_ptr() : nullptr},
      current_stream()));
}

EmbeddingForwardResult lora_embedding_forward_cuda(const at::Tensor& indices,
                                                   const at::Tensor& weight,
                                                   const AdapterOperands& operands,
                                                   int64_t padding_idx) {
  check_lora_embedding("lora_embedding", indices, weight, operands);
  const c10::cuda::CUDAGuard guard(weight.device());
  const int64_t rank = operands.active();
  if (!kernels_serve(indices, weight, rank)) {
    return lora_embedding_forward_composite(indices, weight, operands, padding_idx);
  }
  const CudaAdapter adapter(operands, {});
  const at::Tensor flat = indices.contiguous();
  const kernels::RowIndices rows = row_indices(flat, weight);
  const at::Tensor hidden = at::empty({flat.numel(), rank}, adapter.A.options());
  const at::Tensor gated = adapter.E.defined() ? at::empty_like(hidden) : hidden;
  gather(adapter, rows, hidden, gated);

  std::vector<int64_t> shape = indices.sizes().vec();
  shape.push_back(weight.size(1));
  const at::Tensor y = at::empty(shape, weight.options());
  check_launch(kernels::launch_embedding_output(
      {flat.numel(), weight.size(1), rank, kernel_type(weight), adapter.type(), rows,
       weight.const_data_ptr(), weight.stride(0), gated.const_data_ptr(),
       adapter.B.const_data_ptr(), adapter.B.stride(0), static_cast<float>(adapter.scaling),
       y.mutable_data_ptr(), weight.size(1)},
      current_stream()));
  return {y, hidden};
}

// dA^T[v] = the sum of dh[i] over all i with indices[i] = v.
at::Tensor input_factor_gradient(const at::Tensor& indices, const at::Tensor& weight,
                                 const at::Tensor& lora_A, const at::Tensor& dh,
                                 int64_t padding_idx) {
  const at::Tensor dA = at::zeros(lora_A.sizes(), lora_A.options());
  const auto [sorted, positions] = at::sort(indices, /*stable=*/true, /*dim=*/0,
                                            /*descending=*/false);
  const kernels::ColumnSums problem{dh.size(0),
                                    dh.size(1),
                                    kernel_type(dh),
                                    row_indices(sorted, weight),
                                    positions.const_data_ptr<int64_t>(),
                                    dh.const_data_ptr(),
                                    padding_idx,
                                    dA.mutable_data_ptr(),
                                    dA.stride(0)};
  c10::DataPtr sums = scratch(kernels::column_sums_scratch_bytes(problem));
  check_launch(kernels::launch_column_sums(problem, sums.mutable_get(), current_stream()));
  return dA;
}

EmbeddingBackwardResult lora_embedding_backward_cuda(const at::Tensor& grad_output,
                                                     const at::Tensor& indices,
                                                     const at::Tensor& weight,
                                                     const AdapterOperands& operands,
                                                     const at::Tensor& hidden, int64_t padding_idx,
                                                     std::array<bool, 4> output_mask) {
  check_lora_embedding("lora_embedding", indices, weight, operands);
  check_embedding_backward("lora_embedding", grad_output, indices, weight, operands, hidden);
  const c10::cuda::CUDAGuard guard(weight.device());
  const int64_t rank = operands.active(), capacity = operands.lora_A.size(0);
  if (!kernels_serve(indices, weight, rank)) {
    return lora_embedding_backward_composite(grad_output, indices, weight, operands, hidden,
                                             padding_idx, output_mask);
  }
  const CudaAdapter adapter(operands, {});
  const at::Tensor dy = matrix(grad_output), flat = indices.reshape({indices.numel()}).contiguous();
  const auto [need_w, need_A, need_B, need_E] = output_mask;
  at::Tensor dw, dA;
  OutputGradients from_dy;

  if (need_A) from_dy.dh = at::empty({dy.size(0), rank}, adapter.A.options());
  if (need_B) from_dy.dB = gradient_of(operands.lora_B, capacity, rank);
  if (need_E) from_dy.dE = gradient_of(*operands.lora_E, capacity, rank);
  if (need_A || need_B || need_E) output_gradients(adapter, dy, hidden.contiguous(), from_dy);
  if (need_A) dA = input_factor_gradient(flat, weight, operands.lora_A, from_dy.dh, padding_idx);
  if (need_w) {
    dw = at::embedding_dense_backward(dy, flat, weight.size(0), padding_idx,
                                      /*scale_grad_by_freq=*/false);
  }
  return {dw, dA, from_dy.dB, from_dy.dE};
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_lora_embedding_forward",
         &rankwise::embedding_forward<rankwise::lora_embedding_forward_cuda>);
  m.impl("_lora_embedding_backward",
         &rankwise::embedding_backward<rankwise::lora_embedding_backward_cuda>);
}
