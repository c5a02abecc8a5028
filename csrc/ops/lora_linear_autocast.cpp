// Autocast: x, W0 and bias go to the lower precision as in F.linear; the adapter keeps its own
// dtype when that is float32, so masters get float32 gradients.
#include <ATen/autocast_mode.h>
#include <rankwise/ops.h>
#include <torch/library.h>

#include "checks.h"
#include "find_op.h"

namespace rankwise {
namespace {

template <c10::DeviceType device_type>
at::Tensor lora_linear_autocast(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& lora_A,
                                const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                                double scaling, double dropout_p, std::optional<c10::SymInt> rank) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  const auto lower = at::autocast::get_autocast_dtype(device_type);
  const auto base = [&](const at::Tensor& tensor) {
    return at::autocast::cached_cast(lower, tensor, device_type);
  };
  const at::Tensor x = base(input);
  const auto factor = [&](const at::Tensor& tensor) {
    // A factor in another 16-bit dtype, or a float64 one, follows the base.
    return tensor.scalar_type() == at::kFloat
               ? tensor
               : at::autocast::cached_cast(x.scalar_type(), tensor, device_type);
  };
  std::optional<at::Tensor> low_bias, low_E;
  if (has(bias)) low_bias = base(*bias);
  if (has(lora_E)) low_E = factor(*lora_E);
  static const auto op =
      find_op<decltype(lora_linear_autocast<device_type>)>("rankwise::lora_linear");
  return op.call(x, base(weight), low_bias, factor(lora_A), factor(lora_B), low_E, scaling,
                 dropout_p, rank);
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, AutocastCPU, m) {
  m.impl("lora_linear", &rankwise::lora_linear_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(rankwise, AutocastCUDA, m) {
  m.impl("lora_linear", &rankwise::lora_linear_autocast<c10::DeviceType::CUDA>);
}
