// The operator of linear layers that share their input. It is as those of ops.h are.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <vector>

namespace rankwise {

// One of the layers that lora_linear_group computes; its tensors and numbers as in lora_linear.
struct GroupedLinear {
  at::Tensor weight;
  std::optional<at::Tensor> bias = {};
  at::Tensor lora_A, lora_B;
  std::optional<at::Tensor> lora_E = {};
  double scaling = 1.0;
  std::optional<c10::SymInt> rank = {};
};

// Layers that share their input, such as an attention's q, k and v: lora_linear of each, at least
// one, with one pass over x for all their A and one sum for x's gradient. Their out sizes, ranks
// and scalings may differ; in sizes, devices and dtypes may not. With dropout one mask of x serves
// all layers. Backward frees what all the outputs need at once.
std::vector<at::Tensor> lora_linear_group(const at::Tensor& input,
                                          const std::vector<GroupedLinear>& layers,
                                          double dropout_p = 0.0);

}  // namespace rankwise
