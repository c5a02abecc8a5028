// Autocast: x, W0, bias and a base output go to the lower precision as in F.linear; the adapter
// keeps its own dtype when that is float32, so masters get float32 gradients.
#include <ATen/autocast_mode.h>
#include <rankwise/ops.h>
#include <torch/library.h>

#include "checks.h"
#include "find_op.h"
#include "layer_group.h"

namespace rankwise {
namespace {

// Tensors of a call in the precisions that they have under autocast.
class Casts {
 public:
  explicit Casts(c10::DeviceType device)
      : device_(device), lower_(at::autocast::get_autocast_dtype(device)) {}

  at::Tensor base(const at::Tensor& tensor) const {
    return at::autocast::cached_cast(lower_, tensor, device_);
  }
  // A factor in another 16-bit dtype, or a float64 one, follows the base.
  at::Tensor factor(const at::Tensor& tensor, at::ScalarType base_dtype) const {
    return tensor.scalar_type() == at::kFloat
               ? tensor
               : at::autocast::cached_cast(base_dtype, tensor, device_);
  }
  std::optional<at::Tensor> factor(const std::optional<at::Tensor>& tensor,
                                   at::ScalarType base_dtype) const {
    return has(tensor) ? std::optional(factor(*tensor, base_dtype)) : std::nullopt;
  }

 private:
  c10::DeviceType device_;
  at::ScalarType lower_;
};

template <c10::DeviceType device_type>
at::Tensor lora_linear_autocast(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& lora_A,
                                const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                                double scaling, double dropout_p, std::optional<c10::SymInt> rank) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  const Casts cast(device_type);
  const at::Tensor x = cast.base(input);
  const at::ScalarType dtype = x.scalar_type();
  static const auto op =
      find_op<decltype(lora_linear_autocast<device_type>)>("rankwise::lora_linear");
  return op.call(x, cast.base(weight), has(bias) ? std::optional(cast.base(*bias)) : std::nullopt,
                 cast.factor(lora_A, dtype), cast.factor(lora_B, dtype), cast.factor(lora_E, dtype),
                 scaling, dropout_p, rank);
}

template <c10::DeviceType device_type>
at::Tensor lora_update_autocast(const at::Tensor& base_output, const at::Tensor& input,
                                const at::Tensor& lora_A, const at::Tensor& lora_B,
                                const std::optional<at::Tensor>& lora_E, double scaling,
                                double dropout_p, std::optional<c10::SymInt> rank) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  const Casts cast(device_type);
  const at::Tensor x = cast.base(input);
  const at::ScalarType dtype = x.scalar_type();
  static const auto op =
      find_op<decltype(lora_update_autocast<device_type>)>("rankwise::lora_update");
  return op.call(cast.base(base_output), x, cast.factor(lora_A, dtype), cast.factor(lora_B, dtype),
                 cast.factor(lora_E, dtype), scaling, dropout_p, rank);
}

template <c10::DeviceType device_type>
std::vector<at::Tensor> lora_linear_group_autocast(const at::Tensor& input, at::TensorList weights,
                                                   const OptionalTensors& biases,
                                                   at::TensorList lora_A, at::TensorList lora_B,
                                                   const OptionalTensors& lora_E,
                                                   at::ArrayRef<double> scaling, double dropout_p,
                                                   at::OptionalSymIntArrayRef ranks) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  const Casts cast(device_type);
  const at::Tensor x = cast.base(input);
  const at::ScalarType dtype = x.scalar_type();
  std::vector<at::Tensor> cast_weights, cast_A, cast_B;
  OptionalTensors cast_biases, cast_E;
  for (const at::Tensor& weight : weights) cast_weights.push_back(cast.base(weight));
  for (const at::Tensor& A : lora_A) cast_A.push_back(cast.factor(A, dtype));
  for (const at::Tensor& B : lora_B) cast_B.push_back(cast.factor(B, dtype));
  for (const std::optional<at::Tensor> bias : biases)
    cast_biases.push_back(has(bias) ? std::optional(cast.base(*bias)) : std::nullopt);
  for (const std::optional<at::Tensor> E : lora_E) cast_E.push_back(cast.factor(E, dtype));
  static const auto op =
      find_op<decltype(lora_linear_group_autocast<device_type>)>("rankwise::lora_linear_group");
  return op.call(x, cast_weights, cast_biases, cast_A, cast_B, cast_E, scaling, dropout_p, ranks);
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, AutocastCPU, m) {
  m.impl("lora_linear", &rankwise::lora_linear_autocast<c10::DeviceType::CPU>);
  m.impl("lora_update", &rankwise::lora_update_autocast<c10::DeviceType::CPU>);
  m.impl("lora_linear_group", &rankwise::lora_linear_group_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(rankwise, AutocastCUDA, m) {
  m.impl("lora_linear", &rankwise::lora_linear_autocast<c10::DeviceType::CUDA>);
  m.impl("lora_update", &rankwise::lora_update_autocast<c10::DeviceType::CUDA>);
  m.impl("lora_linear_group", &rankwise::lora_linear_group_autocast<c10::DeviceType::CUDA>);
}
