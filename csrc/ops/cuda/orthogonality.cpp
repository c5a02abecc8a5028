// The orthogonality penalty on CUDA: all factors in three launches, with the gradient in two or
// three. Nothing waits for the device. A CUDA graph records the composite form.
#include "../../kernels/allocation/orthogonality.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../orthogonality.h"
#include "device_table.h"
#include "launch.h"
#include "path.h"

namespace rankwise {
namespace {

constexpr const char* op = "orthogonality_penalty";

// A [capacity, in] or B [out, capacity]; its gradient may be undefined.
kernels::OrthogonalityEntry entry_of(const at::Tensor& factor, const at::Tensor& gradient,
                                     bool is_A, int64_t rank) {
  const int directions = is_A ? 0 : 1, features = 1 - directions;
  return {factor.const_data_ptr(),
          rank,
          factor.size(directions),
          factor.size(features),
          factor.stride(directions),
          factor.stride(features),
          gradient.defined() ? gradient.mutable_data_ptr() : nullptr,
          is_A};
}

// The table of all factors and the memory that launches need: all A, then all B.
class Problem {
 public:
  Problem(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks,
          const std::vector<at::Tensor>& gradients, bool squared) {
    const at::Device device = lora_A[0].device();
    const size_t count = 2 * ranks.size();
    std::vector<kernels::OrthogonalityEntry> entries;
    for (size_t i = 0; i < count; ++i) {
      const bool is_A = i < ranks.size();
      const at::Tensor& factor = is_A ? lora_A[i] : lora_B[i - ranks.size()];
      check_device(op, "factors", factor, device);
      entries.push_back(entry_of(factor, gradients.empty() ? at::Tensor() : gradients[i], is_A,
                                 ranks[i % ranks.size()]));
    }
    arguments_.count = static_cast<int64_t>(count);
    arguments_.blocks = kernels::lay_out(entries.data(), arguments_.count);
    arguments_.type = element_type(op, lora_A[0].scalar_type());
    arguments_.squared = squared;
    const size_t start = table_.add(entries);
    table_.upload(device);
    arguments_.factors = table_.at<kernels::OrthogonalityEntry>(start);
    deviations_ = at::empty({arguments_.blocks.sums}, sums_like(lora_A[0]));
    terms_ = at::empty({arguments_.count}, sums_like(lora_A[0]).dtype(at::kDouble));
    arguments_.deviations = deviations_.mutable_data_ptr();
    arguments_.terms = terms_.mutable_data_ptr<double>();
  }

  const kernels::Orthogonality& arguments() const { return arguments_; }

  // float64 for float64 factors, float32 for others.
  static at::TensorOptions sums_like(const at::Tensor& factor) {
    return at::TensorOptions(at::toOpMathType(factor.scalar_type())).device(factor.device());
  }

 private:
  kernels::Orthogonality arguments_{};
  DeviceTable table_;
  at::Tensor deviations_, terms_;
};

at::Tensor penalty_cuda(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks,
                        bool squared) {
  check_orthogonality(lora_A, lora_B, ranks);
  const c10::cuda::CUDAGuard guard(lora_A[0].device());
  if (records_graph() || !has_kernels(lora_A[0].device()))
    return orthogonality_penalty_composite(lora_A, lora_B, ranks, squared);
  const Problem problem(lora_A, lora_B, ranks, {}, squared);
  const at::Tensor penalty = at::empty({}, Problem::sums_like(lora_A[0]));
  check_launch(kernels::launch_orthogonality_penalty(problem.arguments(),
                                                     penalty.mutable_data_ptr(), current_stream()));
  return penalty;
}

std::vector<at::Tensor> penalty_backward_cuda(const at::Tensor& grad_output, at::TensorList lora_A,
                                              at::TensorList lora_B, at::IntArrayRef ranks,
                                              bool squared) {
  check_orthogonality(lora_A, lora_B, ranks);
  const c10::cuda::CUDAGuard guard(lora_A[0].device());
  if (records_graph() || !has_kernels(lora_A[0].device()))
    return orthogonality_backward_composite(grad_output, lora_A, lora_B, ranks, squared);
  std::vector<at::Tensor> gradients;
  for (const at::TensorList factors : {lora_A, lora_B})
    for (const at::Tensor& factor : factors)
      gradients.push_back(at::empty(factor.sizes(), factor.options()));
  const Problem problem(lora_A, lora_B, ranks, gradients, squared);
  const at::Tensor grad = grad_output.to(Problem::sums_like(lora_A[0])).contiguous();
  check_launch(kernels::launch_orthogonality_gradient(problem.arguments(), grad.const_data_ptr(),
                                                      current_stream()));
  return gradients;
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("orthogonality_penalty", &rankwise::penalty_cuda);
  m.impl("_orthogonality_backward", &rankwise::penalty_backward_cuda);
}
