// The JSON of a safetensors header, read token by token.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "safetensors.h"

namespace rankwise::io {

/// Appends the tensors (in the order of the text) and the metadata of `json` to `header`. Only the
/// grammar is checked: a tensor has exactly the members dtype (a known one), shape (non-negative
/// 63-bit integers) and data_offsets (two). There are at most `most_tensors` tensors
/// and max_metadata metadata. Throws FileError beginning with `file`.
void parse_header_json(std::string_view json, size_t most_tensors, const std::string& file,
                       Header& header);

}  // namespace rankwise::io
