// lora_linear_group's operands and its inner ops as typed calls: a forward with what backwards need
// and a backward, of all layers at once.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <rankwise/linear_group.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"

namespace rankwise {

// Layers of one input. `rank` is given in each; biases are absent in backwards.
struct LayerGroup {
  std::vector<GroupedLinear> layers;
  double dropout_p;

  size_t size() const { return layers.size(); }
  const GroupedLinear& operator[](size_t i) const { return layers[i]; }
  AdapterOperands adapter(size_t i) const {
    const GroupedLinear& layer = layers[i];
    return {layer.lora_A, layer.lora_B, layer.lora_E, layer.scaling, dropout_p, *layer.rank};
  }
  c10::SymInt rank() const;             // of all together
  c10::SymInt offset(size_t of) const;  // of a layer's columns in `hidden`
  LayerGroup of(const std::vector<size_t>& chosen) const;
};

struct GroupForwardResult {
  std::vector<at::Tensor> outputs;  // of each layer, [..., out]
  at::Tensor hidden;                // drop(x) A^T of all, beside one another: [tokens, rank]
  at::Tensor seed;                  // int64 [1], or [0] without dropout: one mask for all
};

// Gradients of weight, bias, lora_A, lora_B and lora_E, undefined where not asked for.
using LayerGradients = std::array<at::Tensor, 5>;
struct GroupGradients {
  at::Tensor input;
  std::vector<LayerGradients> layers;
};
// Of input, and of all layers': weight, bias, lora_A, lora_B, lora_E.
using GroupMask = std::array<bool, 6>;

using GroupForward = GroupForwardResult(const at::Tensor& input, const LayerGroup& group);
using GroupBackward = GroupGradients(const std::vector<at::Tensor>& grad_outputs,
                                     const at::Tensor& input, const LayerGroup& group,
                                     const at::Tensor& hidden, const at::Tensor& seed,
                                     const GroupMask& output_mask);
GroupForward lora_linear_group_forward;
GroupBackward lora_linear_group_backward;

// From ATen ops alone, every step differentiable; the form of devices without kernels.
GroupForward lora_linear_group_forward_composite;
GroupBackward lora_linear_group_backward_composite;

// Throw as check_lora_linear and check_backward, naming the layer.
void check_group(const at::Tensor& input, const LayerGroup& group);
void check_group_backward(const std::vector<at::Tensor>& grad_outputs, const at::Tensor& input,
                          const LayerGroup& group, const at::Tensor& hidden,
                          const at::Tensor& seed);

// The functions of the schemas, whose operands are lists.

using Tensors = std::vector<at::Tensor>;
using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Throws unless all lists have one length > 0. `biases` null in backwards.
LayerGroup listed(at::TensorList weights, const OptionalTensors* biases, at::TensorList lora_A,
                  at::TensorList lora_B, const OptionalTensors& lora_E,
                  at::ArrayRef<double> scaling, double dropout_p, at::OptionalSymIntArrayRef ranks);

// Outputs, hidden, seed.
Tensors flat(const GroupForwardResult& result);
GroupForwardResult forward_result(Tensors flat);

// The gradients that are asked for and exist, input's first, then those of each layer.
Tensors flat(const GroupGradients& gradients);
GroupGradients gradients(const Tensors& flat, const LayerGroup& group, const GroupMask& mask);

template <GroupForward& kernel>
Tensors group_forward(const at::Tensor& input, at::TensorList weights,
                      const OptionalTensors& biases, at::TensorList lora_A, at::TensorList lora_B,
                      const OptionalTensors& lora_E, at::ArrayRef<double> scaling, double dropout_p,
                      c10::SymIntArrayRef ranks) {
  return flat(
      kernel(input, listed(weights, &biases, lora_A, lora_B, lora_E, scaling, dropout_p, ranks)));
}

template <GroupBackward& kernel>
Tensors group_backward(at::TensorList grad_outputs, const at::Tensor& input, at::TensorList weights,
                       at::TensorList lora_A, at::TensorList lora_B, const OptionalTensors& lora_E,
                       const at::Tensor& hidden, const at::Tensor& seed,
                       at::ArrayRef<double> scaling, double dropout_p, c10::SymIntArrayRef ranks,
                       GroupMask output_mask) {
  return flat(kernel(grad_outputs.vec(), input,
                     listed(weights, nullptr, lora_A, lora_B, lora_E, scaling, dropout_p, ranks),
                     hidden, seed, output_mask));
}

}  // namespace rankwise
