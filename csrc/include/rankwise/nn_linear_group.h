// Layers that share their input, called as one.
#pragma once

#include <rankwise/nn.h>

#include <variant>
#include <vector>

namespace rankwise::nn {

/// Layers that share their input, such as an attention's q, k and v, called as one: x is read once
/// for all their A, and its gradient summed once (lora_linear_group, whose dropout has one mask of
/// x for all). The layers stay modules of their owner, with their names; the group holds no
/// parameters and follows whatever becomes of them. A clone of their owner makes a group of its
/// own.
class LoRALinearGroup {
 public:
  using Layer = std::variant<LoRALinear, AdaLoRALinear>;

  /// Throws std::invalid_argument without layers, or where their in_features differ.
  explicit LoRALinearGroup(std::vector<Layer> layers);

  /// Input [..., in], results [..., out] of each layer in order. Layers that are merged or have no
  /// active adapter, or that differ in dropout, mode or dtype, are called one by one. Throws as
  /// they do.
  std::vector<at::Tensor> operator()(const at::Tensor& input) const;

 private:
  std::vector<Layer> layers_;
};

}  // namespace rankwise::nn
