// Tensors of any type as the bytes of a safetensors file, such as one beside an adapter
// (AdapterFile::beside).
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/file_error.h>

#include <map>
#include <string>
#include <string_view>

namespace rankwise {

/// Tensors on any device, with any strides; their own memory is not shared with the result. Throws
/// io::FileError beginning with `file` that names a tensor which is not plain memory or whose type
/// the format does not have.
std::string format_tensors(const std::map<std::string, at::Tensor>& tensors,
                           const std::string& file);

/// Fresh contiguous CPU tensors. Every byte is treated as hostile; throws io::FileError beginning
/// with `file`.
std::map<std::string, at::Tensor> parse_tensors(std::string_view bytes, const std::string& file);

}  // namespace rankwise
