// Which implementation serves a CUDA tensor: the kernels or the composite form.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace rankwise {

// Whether this binary has kernels for `device`; warns at the first call for a device without.
bool has_kernels(const at::Device& device);

// Why the kernels do not serve `dtype` on `device`: "" where they do.
std::string composite_reason(at::ScalarType dtype, const at::Device& device);

}  // namespace rankwise
