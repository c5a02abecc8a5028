// Launches the passes that read x or dy once.
#include "adapter.h"

#include <c10/cuda/CUDACachingAllocator.h>

#include "launch.h"

namespace rankwise {

kernels::Type kernel_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return kernels::Type::bfloat16;
    case at::kHalf:
      return kernels::Type::float16;
    case at::kFloat:
      return kernels::Type::float32;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernels for ", tensor.scalar_type());
  }
}

c10::DataPtr scratch(int64_t bytes) {
  return c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes));
}

at::Tensor gradient_of(const at::Tensor& factor, int64_t capacity, int64_t rank) {
  return rank == capacity ? at::empty(factor.sizes(), factor.options())
                          : at::zeros(factor.sizes(), factor.options());
}

PendingGate output_gradients(const CudaAdapter& adapter, const at::Tensor& dy,
                             const at::Tensor& hidden, const OutputGradients& out,
                             const ProductTerm& term, bool dE_later) {
  const auto pointer = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
  };
  kernels::OutputGradient problem{dy.size(0),
                                  dy.size(1),
                                  adapter.rank(),
                                  kernel_type(dy),
                                  adapter.type(),
                                  dy.const_data_ptr(),
                                  dy.stride(0),
                                  adapter.B.const_data_ptr(),
                                  adapter.B.stride(0),
                                  adapter.gate(),
                                  hidden.const_data_ptr(),
                                  static_cast<float>(adapter.scaling),
                                  adapter.keep_scale(),
                                  pointer(out.dh),
                                  pointer(out.dB),
                                  out.dB.defined() ? out.dB.stride(0) : 0,
                                  pointer(out.dE)};
  if (!term.left.is_same(out.dh)) problem.term = term.to_write();
  problem.term_right = term.right_parts;
  problem.dE_later = dE_later;
  if (term.dh_parts.defined()) problem.dh_cut = term.dh_parts.mutable_data_ptr();
  c10::DataPtr partial = scratch(kernels::output_gradient_scratch_bytes(problem));
  check_launch(kernels::launch_output_gradient(problem, partial.mutable_get(), current_stream()));
  if (!dE_later) return {};
  const kernels::GateGradient sum = kernels::gate_gradient(problem, partial.mutable_get());
  return {sum, std::move(partial)};
}

void shrink(const CudaAdapter& adapter, const at::Tensor& x, const at::Tensor& hidden,
            const at::Tensor& gated, const ProductTerm& term) {
  const bool apart = gated.defined() && !gated.is_same(hidden);
  const kernels::Shrink problem{x.size(0),
                                x.size(1),
                                adapter.rank(),
                                kernel_type(x),
                                adapter.type(),
                                x.const_data_ptr(),
                                x.stride(0),
                                adapter.A.const_data_ptr(),
                                adapter.A.stride(0),
                                adapter.gate(),
                                adapter.keep_scale(),
                                adapter.mask(),
                                hidden.mutable_data_ptr(),
                                apart ? gated.mutable_data_ptr() : nullptr,
                                term.defined() ? static_cast<float>(adapter.scaling) : 1.0f,
                                term.to_write(),
                                term.right_parts};
  c10::DataPtr partial = scratch(kernels::shrink_scratch_bytes(problem));
  check_launch(kernels::launch_shrink(problem, partial.mutable_get(), current_stream()));
}

void input_factor_gradient(const CudaAdapter& adapter, const at::Tensor& x, const at::Tensor& dh,
                           const at::Tensor& dA, const PendingGate& pending) {
  const kernels::InputFactorGradient problem{
      x.size(0),          x.size(1),   adapter.rank(),      kernel_type(x), adapter.type(),
      x.const_data_ptr(), x.stride(0), dh.const_data_ptr(), adapter.mask(), dA.mutable_data_ptr(),
      dA.stride(0),       pending.sum};
  c10::DataPtr partial = scratch(kernels::input_factor_gradient_scratch_bytes(problem));
  check_launch(
      kernels::launch_input_factor_gradient(problem, partial.mutable_get(), current_stream()));
}

void expand_output(const CudaAdapter& adapter, const at::Tensor& gated, const at::Tensor& out,
                   const at::Tensor& bias, const at::Tensor& base) {
  kernels::Expand problem{out.size(0),
                          out.size(1),
                          adapter.rank(),
                          kernel_type(out),
                          adapter.type(),
                          gated.const_data_ptr(),
                          adapter.B.const_data_ptr(),
                          adapter.B.stride(0),
                          /*transposed=*/true,
                          static_cast<float>(adapter.scaling),
                          kernels::DropoutMask{},
                          out.mutable_data_ptr(),
                          out.stride(0)};
  if (bias.defined()) problem.bias = bias.const_data_ptr();
  if (base.defined()) {
    problem.base = base.const_data_ptr();
    problem.base_stride = base.stride(0);
  }
  check_launch(kernels::launch_expand(problem, current_stream()));
}

void expand_input(const CudaAdapter& adapter, const at::Tensor& dh, const at::Tensor& out) {
  check_launch(kernels::launch_expand(
      {out.size(0), out.size(1), adapter.rank(), kernel_type(out), adapter.type(),
       dh.const_data_ptr(), adapter.A.const_data_ptr(), adapter.A.stride(0), /*transposed=*/false,
       1.0f, adapter.mask(), out.mutable_data_ptr(), out.stride(0)},
      current_stream()));
}

void end_input_factor_gradient(const CudaAdapter& adapter, const at::Tensor& x,
                               const at::Tensor& dA, const c10::DataPtr& slices, int64_t count,
                               const PendingGate& pending) {
  kernels::InputFactorGradient problem{};
  problem.cols = x.size(1);
  problem.rank = adapter.rank();
  problem.factor_type = adapter.type();
  problem.dA = dA.mutable_data_ptr();
  problem.dA_stride = dA.stride(0);
  problem.gate = pending.sum;
  check_launch(kernels::launch_input_factor_end(problem, static_cast<const float*>(slices.get()),
                                                count, current_stream()));
}

OutputSide output_side(const CudaAdapter& adapter, const AdapterOperands& operands,
                       const at::Tensor& dy, const at::Tensor& hidden,
                       std::array<bool, 4> output_mask, const ProductTerm& term) {
  const auto [need_x, need_A, need_B, need_E] = output_mask;
  const int64_t rank = adapter.rank(), capacity = operands.lora_A.size(0);
  OutputSide side;
  if (need_B) side.d.dB = gradient_of(operands.lora_B, capacity, rank);
  if (need_E) side.d.dE = gradient_of(*operands.lora_E, capacity, rank);
  if (need_x || need_A) {
    const bool serves = term.defined() && !term.split() && term.left.is_contiguous();
    side.d.dh = serves ? term.left : at::empty({dy.size(0), rank}, adapter.A.options());
  }
  if (rank > 0 && (need_x || need_A || need_B || need_E)) {
    side.pending = output_gradients(adapter, dy, hidden.contiguous(), side.d, term,
                                    /*dE_later=*/need_E && need_A);
  }
  return side;
}

ParameterGradients parameter_gradients(const CudaAdapter& adapter, const AdapterOperands& operands,
                                       const at::Tensor& dy, const at::Tensor& input,
                                       const at::Tensor& hidden, std::array<bool, 4> output_mask) {
  const OutputSide side = output_side(adapter, operands, dy, hidden, output_mask);
  at::Tensor dA;
  if (output_mask[1]) {
    dA = gradient_of(operands.lora_A, operands.lora_A.size(0), adapter.rank());
    if (adapter.rank() > 0)
      input_factor_gradient(adapter, matrix(input), side.d.dh, dA, side.pending);
  }
  return {side.d.dh, dA, side.d.dB, side.d.dE};
}

}  // namespace rankwise
