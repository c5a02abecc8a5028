// What is known of tensors that autograd, functorch or forward-mode AD may follow.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/functorch/DynamicLayer.h>
#include <c10/core/GradMode.h>

#include <optional>

#include "checks.h"

namespace rankwise {

inline bool has_tangent(const std::optional<at::Tensor>& tensor) {
  return has(tensor) && tensor->_fw_grad(/*level=*/0).defined();
}

// A C++ autograd node knows neither functorch's levels nor tangents; ATen's ops do.
template <typename... Tensors>
bool beyond_nodes(const Tensors&... tensors) {
  return at::functorch::maybeCurrentDynamicLayer().has_value() || (has_tangent(tensors) || ...);
}

inline bool is_tracked(const std::optional<at::Tensor>& tensor) {
  return has(tensor) && tensor->requires_grad();
}

// Whether autograd records what is done with any of the tensors.
template <typename... Tensors>
bool recorded(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (is_tracked(tensors) || ...);
}

}  // namespace rankwise
