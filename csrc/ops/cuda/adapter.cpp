// Launches the pass over dy that every layer's backward has.
#include "adapter.h"

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

at::Tensor scratch(int64_t bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

at::Tensor gradient_of(const at::Tensor& factor, int64_t capacity, int64_t rank) {
  return rank == capacity ? at::empty(factor.sizes(), factor.options())
                          : at::zeros(factor.sizes(), factor.options());
}

void output_gradients(const CudaAdapter& adapter, const at::Tensor& dy, const at::Tensor& hidden,
                      const OutputGradients& out) {
  const auto pointer = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
  };
  const kernels::OutputGradient problem{dy.size(0),
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
  const at::Tensor partial = scratch(kernels::output_gradient_scratch_bytes(problem), dy);
  check_launch(
      kernels::launch_output_gradient(problem, partial.mutable_data_ptr(), current_stream()));
}

}  // namespace rankwise
