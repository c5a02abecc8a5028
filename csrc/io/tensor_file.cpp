// format_tensors and parse_tensors: over the safetensors header of safetensors.h.
#include <ATen/ops/empty.h>
#include <rankwise/tensor_file.h>
#include <rankwise/tensor_memory.h>

#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "message_text.h"
#include "safetensors.h"

namespace rankwise {
namespace {

using io::DType;

constexpr std::array<std::pair<DType, at::ScalarType>, 16> types = {{
    {DType::boolean, at::kBool},
    {DType::u8, at::kByte},
    {DType::i8, at::kChar},
    {DType::f8_e5m2, at::kFloat8_e5m2},
    {DType::f8_e4m3, at::kFloat8_e4m3fn},
    {DType::i16, at::kShort},
    {DType::u16, at::kUInt16},
    {DType::f16, at::kHalf},
    {DType::bf16, at::kBFloat16},
    {DType::i32, at::kInt},
    {DType::u32, at::kUInt32},
    {DType::f32, at::kFloat},
    {DType::c64, at::kComplexFloat},
    {DType::f64, at::kDouble},
    {DType::i64, at::kLong},
    {DType::u64, at::kUInt64},
}};

std::optional<DType> file_type(at::ScalarType type) {
  for (const auto& [file, tensor] : types) {
    if (tensor == type) return file;
  }
  return std::nullopt;
}

std::optional<at::ScalarType> tensor_type(DType type) {
  for (const auto& [file, tensor] : types) {
    if (file == type) return tensor;
  }
  return std::nullopt;
}

[[noreturn]] void fail(const std::string& file, const std::string& name, const std::string& wanted,
                       const std::string& got) {
  throw io::FileError(file + ": tensor " + io::in_quotes(name) + " must be " + wanted + ", got " +
                      got);
}

io::TensorInfo describe(const std::string& name, const at::Tensor& tensor,
                        const std::string& file) {
  if (!tensor.defined()) fail(file, name, "defined", "an undefined tensor");
  const std::string kind = kind_without_memory(tensor);
  if (!kind.empty()) fail(file, name, "dense, with data", kind);
  const std::optional<DType> type = file_type(tensor.scalar_type());
  if (!type)
    fail(file, name, "of a type that safetensors has", c10::toString(tensor.scalar_type()));
  return {.name = name, .dtype = *type, .shape = tensor.sizes().vec()};
}

}  // namespace

std::string format_tensors(const std::map<std::string, at::Tensor>& tensors,
                           const std::string& file) {
  static_assert(std::endian::native == std::endian::little);
  std::vector<io::TensorInfo> infos;
  for (const auto& [name, tensor] : tensors) infos.push_back(describe(name, tensor, file));
  std::string bytes = io::format_header(infos, {{"format", "pt"}}, file);
  for (const io::TensorInfo& info : infos) {
    const at::Tensor plain =
        tensors.at(info.name).detach().to(at::kCPU).resolve_neg().resolve_conj().contiguous();
    bytes.append(static_cast<const char*>(plain.const_data_ptr()), plain.nbytes());
  }
  return bytes;
}

std::map<std::string, at::Tensor> parse_tensors(std::string_view bytes, const std::string& file) {
  const io::Header header = io::parse_header(std::as_bytes(std::span(bytes)), bytes.size(), file);
  std::map<std::string, at::Tensor> tensors;
  for (const io::TensorInfo& info : header.tensors) {
    const std::optional<at::ScalarType> type = tensor_type(info.dtype);
    if (!type) {
      fail(file, info.name, "of a type that torch has", std::string(io::dtype_name(info.dtype)));
    }
    at::Tensor tensor = at::empty(info.shape, at::TensorOptions().dtype(*type).device(at::kCPU));
    const auto* data = bytes.data() + header.data_start + info.begin;
    if (tensor.nbytes() > 0) std::memcpy(tensor.data_ptr(), data, tensor.nbytes());
    tensors.emplace(info.name, std::move(tensor));
  }
  return tensors;
}

}  // namespace rankwise
