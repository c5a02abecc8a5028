// The safetensors header: layout checks and writing. The JSON itself is read in
// safetensors_json.cpp.
#include "safetensors.h"

#include <rankwise/file_error.h>

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>

#include "message_text.h"
#include "safetensors_json.h"

namespace rankwise::io {
namespace {

struct DTypeRow {
  DType dtype;
  std::string_view name;
  uint64_t bits;
};

constexpr std::array<DTypeRow, 22> dtype_rows = {{
    {DType::boolean, "BOOL", 8},
    {DType::f4, "F4", 4},
    {DType::f6_e2m3, "F6_E2M3", 6},
    {DType::f6_e3m2, "F6_E3M2", 6},
    {DType::u8, "U8", 8},
    {DType::i8, "I8", 8},
    {DType::f8_e5m2, "F8_E5M2", 8},
    {DType::f8_e4m3, "F8_E4M3", 8},
    {DType::f8_e8m0, "F8_E8M0", 8},
    {DType::f8_e4m3fnuz, "F8_E4M3FNUZ", 8},
    {DType::f8_e5m2fnuz, "F8_E5M2FNUZ", 8},
    {DType::i16, "I16", 16},
    {DType::u16, "U16", 16},
    {DType::f16, "F16", 16},
    {DType::bf16, "BF16", 16},
    {DType::i32, "I32", 32},
    {DType::u32, "U32", 32},
    {DType::f32, "F32", 32},
    {DType::c64, "C64", 64},
    {DType::f64, "F64", 64},
    {DType::i64, "I64", 64},
    {DType::u64, "U64", 64},
}};

const DTypeRow& row_of(DType dtype) {
  return dtype_rows[static_cast<size_t>(dtype)];
}

/// Bytes of a tensor; nullopt when they overflow 63 bits or are not whole. Zero sizes do not hide
/// an overflow of the others, because strides are products of those.
std::optional<uint64_t> byte_size(const TensorInfo& tensor) {
  uint64_t bits = row_of(tensor.dtype).bits;
  bool empty = false;
  for (const int64_t size : tensor.shape) {
    if (size < 0) return std::nullopt;
    if (size == 0) {
      empty = true;
    } else if (bits > uint64_t{std::numeric_limits<int64_t>::max()} / static_cast<uint64_t>(size)) {
      return std::nullopt;
    } else {
      bits *= static_cast<uint64_t>(size);
    }
  }
  if (empty) return 0;
  if (bits % 8 != 0) return std::nullopt;
  return bits / 8;
}

void check_sizes(const TensorInfo& tensor, uint64_t data_size, const std::string& file) {
  const auto fail = [&](const std::string& wanted) {
    throw FileError(file + ": tensor " + in_quotes(tensor.name) + ": " + wanted);
  };
  const std::string got =
      ", got [" + std::to_string(tensor.begin) + ", " + std::to_string(tensor.end) + "]";
  const std::optional<uint64_t> bytes = byte_size(tensor);
  if (!bytes) fail("shape must give a whole number of bytes below 2^60");
  if (tensor.begin > tensor.end || tensor.end > data_size) {
    fail("data_offsets must be ordered and within the file's " + std::to_string(data_size) +
         " data bytes" + got);
  }
  if (tensor.end - tensor.begin != *bytes) {
    fail("data_offsets must span " + std::to_string(*bytes) + " bytes" + got);
  }
}

void check_cover(const std::vector<TensorInfo>& tensors, uint64_t data_size,
                 const std::string& file) {
  uint64_t position = 0;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.begin != position) {
      throw FileError(file + ": tensor " + in_quotes(tensor.name) + ": data must begin at byte " +
                      std::to_string(position) + " (no overlap, no hole), got " +
                      std::to_string(tensor.begin));
    }
    position = tensor.end;
  }
  if (position != data_size) {
    throw FileError(file + ": the tensors must cover all " + std::to_string(data_size) +
                    " data bytes, got " + std::to_string(position));
  }
}

void check_names(const std::vector<TensorInfo>& tensors, const std::string& file) {
  std::vector<const std::string*> names;
  names.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) names.push_back(&tensor.name);
  std::sort(names.begin(), names.end(), [](auto* a, auto* b) { return *a < *b; });
  const auto twice =
      std::adjacent_find(names.begin(), names.end(), [](auto* a, auto* b) { return *a == *b; });
  if (twice != names.end()) {
    throw FileError(file + ": tensor " + in_quotes(**twice) + " is given twice");
  }
}

}  // namespace

std::string_view dtype_name(DType dtype) {
  return row_of(dtype).name;
}

std::optional<DType> parse_dtype(std::string_view name) {
  for (const DTypeRow& row : dtype_rows) {
    if (row.name == name) return row.dtype;
  }
  return std::nullopt;
}

uint64_t header_length(std::span<const std::byte> head, uint64_t file_size,
                       const std::string& file) {
  if (head.size() < 8 || file_size < 8) {
    throw FileError(file + ": must hold at least 8 bytes, got " + std::to_string(file_size));
  }
  uint64_t length = 0;
  for (size_t i = 0; i < 8; ++i) length |= std::to_integer<uint64_t>(head[i]) << (8 * i);
  const uint64_t limit = std::min(max_header_length, file_size - 8);
  if (length > limit) {
    throw FileError(file + ": header length must be at most " + std::to_string(limit) + ", got " +
                    std::to_string(length));
  }
  return length;
}

Header parse_header(std::span<const std::byte> head, uint64_t file_size, const std::string& file) {
  const uint64_t length = header_length(head, file_size, file);
  if (head.size() - 8 < length) {
    throw FileError(file + ": header must be " + std::to_string(length) + " bytes, got " +
                    std::to_string(head.size() - 8));
  }
  const std::span<const std::byte> json = head.subspan(8, length);
  Header header;
  header.data_start = 8 + length;
  const uint64_t data_size = file_size - header.data_start;
  parse_header_json({reinterpret_cast<const char*>(json.data()), json.size()},
                    max_tensors(file_size), file, header);
  check_names(header.tensors, file);
  for (const TensorInfo& tensor : header.tensors) check_sizes(tensor, data_size, file);
  std::sort(header.tensors.begin(), header.tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  check_cover(header.tensors, data_size, file);
  return header;
}

std::string format_header(std::vector<TensorInfo>& tensors,
                          const std::map<std::string, std::string>& metadata,
                          const std::string& file) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    const uint64_t a_bits = row_of(a.dtype).bits;
    const uint64_t b_bits = row_of(b.dtype).bits;
    return std::tie(b_bits, a.name) < std::tie(a_bits, b.name);
  });
  std::string text = "{";
  const auto add = [&](const std::string& name, const nlohmann::ordered_json& value) {
    if (text.size() > 1) text += ',';
    text += nlohmann::json(name).dump() + ':' + value.dump();
  };
  uint64_t position = 0;
  try {
    if (!metadata.empty()) add("__metadata__", metadata);
    for (TensorInfo& tensor : tensors) {
      const std::optional<uint64_t> bytes = byte_size(tensor);
      if (!bytes) throw FileError(file + ": tensor " + in_quotes(tensor.name) + " is too large");
      tensor.begin = position;
      tensor.end = position += *bytes;
      add(tensor.name, {{"dtype", dtype_name(tensor.dtype)},
                        {"shape", tensor.shape},
                        {"data_offsets", {tensor.begin, tensor.end}}});
    }
  } catch (const nlohmann::json::exception&) {
    throw FileError(file + ": tensor names and metadata must be valid UTF-8");
  }
  text += '}';
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (text.size() > max_header_length) throw FileError(file + ": the header is too large");
  std::string result(8, '\0');
  for (size_t i = 0; i < 8; ++i) result[i] = static_cast<char>(text.size() >> (8 * i));
  return result + text;
}

}  // namespace rankwise::io
