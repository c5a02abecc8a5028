// The safetensors header: 8 bytes of little-endian length, JSON, then the tensors' bytes.
// Format: https://github.com/huggingface/safetensors. Torch-free, and strict: every byte is taken
// as hostile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace rankwise::io {

/// The element types of the format. f4 and f6 are packed, several elements to a byte.
enum class DType {
  boolean,
  f4,
  f6_e2m3,
  f6_e3m2,
  u8,
  i8,
  f8_e5m2,
  f8_e4m3,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  c64,
  f64,
  i64,
  u64,
};

/// The name in the file, e.g. "BF16".
std::string_view dtype_name(DType dtype);
std::optional<DType> parse_dtype(std::string_view name);

struct TensorInfo {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  ///< bytes from the start of the data, which follows the header
  uint64_t end = 0;
};

struct Header {
  std::vector<TensorInfo> tensors;              ///< in the order of their bytes
  std::map<std::string, std::string> metadata;  ///< `__metadata__`
  uint64_t data_start = 0;                      ///< bytes from the start of the file
};

constexpr uint64_t max_header_length = 100'000'000;
constexpr size_t max_metadata = size_t{1} << 15;
constexpr size_t max_dimensions = 64;

/// A tensor takes about a kilobyte of memory, whatever its size: what a small file may hold, and
/// large ones of tensors larger than that.
constexpr size_t max_tensors(uint64_t file_size) {
  return (size_t{1} << 15) + static_cast<size_t>(file_size / 2048);
}

/// Length of the JSON header, from the first 8 bytes of the file. Throws FileError when `head` is
/// shorter, or when the length exceeds max_header_length or the file.
uint64_t header_length(std::span<const std::byte> head, uint64_t file_size,
                       const std::string& file);

/// Parses and checks a header. `head` holds at least the first 8 + header_length bytes of a file of
/// `file_size` bytes. Afterwards the tensors have distinct names, and their bytes cover the rest of
/// the file without gap or overlap. Throws FileError naming `file`, the tensor, what was wanted and
/// what was found.
Header parse_header(std::span<const std::byte> head, uint64_t file_size, const std::string& file);

/// Lays out tensors and writes the header in front of them: sorts `tensors` (larger elements first,
/// then by name, so that each tensor is aligned to its element size), sets begin and end, and
/// returns length + JSON, padded to a multiple of 8 bytes. Names must be distinct. Throws FileError
/// naming `file` for what parse_header would refuse.
std::string format_header(std::vector<TensorInfo>& tensors,
                          const std::map<std::string, std::string>& metadata,
                          const std::string& file);

}  // namespace rankwise::io
