// Whether a tensor's data pointer may be read: of subclasses, other layouts and tensors without
// data it leads nowhere, or to something else than the elements.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace rankwise {

/// Empty when the elements lie in memory where sizes and strides say; else what the tensor is
/// instead: "DTensor", "Sparse", "meta", "freed memory", ...
std::string kind_without_memory(const at::Tensor& tensor);

/// Whether elements may share memory, as an expanded tensor's do, so that it cannot be written.
bool has_overlap(const at::Tensor& tensor);

/// How a tensor subclass of Python's is called in kind_without_memory; set by the Python package.
void set_class_name(std::string (*class_name)(const at::Tensor&));

}  // namespace rankwise
