// read_adapter and write_adapter: tensors to and from the two files of a PEFT folder.
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <rankwise/adapter_file.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <vector>

#include "adapter_checksums.h"
#include "adapter_config.h"
#include "adapter_layout.h"
#include "adapter_tensors.h"
#include "allocation_metadata.h"
#include "atomic_directory.h"
#include "message_text.h"
#include "safetensors.h"

namespace rankwise {
namespace {

namespace fs = std::filesystem;
using io::FileError;

const std::string model_name = "adapter_model.safetensors";
const std::string config_name = "adapter_config.json";

std::vector<io::File> open_adapter(const fs::path& directory,
                                   const std::vector<std::string>& beside) {
  std::vector<std::string> names{model_name, config_name};
  names.insert(names.end(), beside.begin(), beside.end());
  try {
    return io::open_file_set(directory, names);
  } catch (const FileError&) {
    const io::Directory folder(directory);
    const std::optional<io::File> pickle = folder.open("adapter_model.bin");
    if (!pickle || folder.open(model_name)) throw;
    throw FileError(pickle->path() +
                    ": pickle files are not read, because they can run code; convert it in a "
                    "trusted Python with "
                    "safetensors.torch.save_file(torch.load(PATH, weights_only=True), \"" +
                    model_name + "\")");
  }
}

std::string read_whole(const io::File& file) {
  std::string text(file.size(), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

std::string read_config(const io::File& file) {
  if (file.size() > io::max_config_size) {
    throw FileError(file.path() + ": must be at most " + std::to_string(io::max_config_size) +
                    " bytes, got " + std::to_string(file.size()));
  }
  return read_whole(file);
}

void check_beside(const std::map<std::string, std::string>& files, const fs::path& directory) {
  for (const auto& [name, bytes] : files) {
    const bool taken = name == model_name || name == config_name || name.starts_with(".");
    if (!name.empty() && !taken && name.find('/') == std::string::npos) continue;
    throw FileError(directory.string() +
                    ": a file beside an adapter must have a name of its own, " +
                    "no path and not hidden, got " + io::in_quotes(name));
  }
}

io::Header read_header(const io::File& file) {
  const uint64_t size = file.size();
  std::vector<std::byte> head(std::min<uint64_t>(size, 8));
  file.read(0, head);
  head.resize(8 + io::header_length(head, size, file.path()));
  file.read(0, head);
  return io::parse_header(head, size, file.path());
}

std::span<const std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()};
}

/// In parts, because at::isfinite makes copies.
bool all_finite(const at::Tensor& tensor) {
  constexpr int64_t part = int64_t{1} << 20;
  const at::Tensor values = tensor.view(-1);
  for (int64_t i = 0; i < values.numel(); i += part) {
    const int64_t size = std::min(part, values.numel() - i);
    if (!at::isfinite(values.narrow(0, i, size)).all().item<bool>()) return false;
  }
  return true;
}

at::Tensor read_tensor(const io::File& file, const io::TensorInfo& info, uint64_t data_start) {
  const auto options = at::TensorOptions().dtype(io::tensor_dtype(info.dtype)).device(at::kCPU);
  at::Tensor tensor = at::empty(info.shape, options);
  TORCH_INTERNAL_ASSERT(tensor.nbytes() == info.end - info.begin);
  file.read(data_start + info.begin, {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()});
  if (!all_finite(tensor)) {
    TORCH_WARN(file.path(), ": tensor ", io::in_quotes(info.name), " has NaN or infinite values");
  }
  return tensor;
}

AdapterConfig parse_config(const std::string& text, const std::string& path) {
  constexpr size_t shown = 20;
  std::vector<std::string> unknown;
  AdapterConfig config = io::parse_adapter_config(text, path, &unknown);
  if (unknown.size() > shown) {
    const std::string more = "and " + std::to_string(unknown.size() - shown) + " more";
    unknown.resize(shown);
    unknown.push_back(more);
  }
  if (!unknown.empty()) {
    TORCH_WARN(path, ": options that are not known here are ignored, whatever they change: ",
               c10::Join(", ", unknown));
  }
  return config;
}

}  // namespace

AdapterFile read_adapter(const fs::path& directory, const std::vector<std::string>& beside) {
  const std::vector<io::File> files = open_adapter(directory, beside);
  const std::string &model_path = files[0].path(), &config_path = files[1].path();
  const std::string config = read_config(files[1]);
  AdapterFile adapter{parse_config(config, config_path), {}, {}};
  io::Header header = read_header(files[0]);
  io::check_adapter_layout(header.tensors, adapter.config, model_path);
  std::optional<io::AdapterChecksums> checksums;
  if (io::has_checksums(header.metadata)) checksums.emplace(header.metadata, config, config_path);
  for (const io::TensorInfo& info : header.tensors) {
    const at::Tensor tensor = read_tensor(files[0], info, header.data_start);
    if (checksums) checksums->add(info, bytes_of(tensor));
    adapter.tensors.emplace(info.name, tensor);
  }
  if (checksums) checksums->verify(header.metadata, model_path);
  for (size_t i = 0; i < beside.size(); ++i) {
    const io::File& file = files[2 + i];
    const auto [read, added] = adapter.beside.emplace(beside[i], read_whole(file));
    io::verify_beside(header.metadata, read->first, read->second, file.path());
  }
  io::remove_checksums(header.metadata);
  io::take_allocation(header.metadata, adapter.config.allocation, model_path);
  adapter.metadata = std::move(header.metadata);
  return adapter;
}

void write_adapter(const fs::path& directory, const AdapterFile& adapter) {
  static_assert(std::endian::native == std::endian::little);
  check_beside(adapter.beside, directory);
  const std::string model_path = (directory / model_name).string();
  std::vector<io::TensorInfo> infos;
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : adapter.tensors) {
    infos.push_back(io::describe(name, tensor, model_path));
    tensors.emplace(name, tensor.detach().to(at::kCPU).resolve_neg().contiguous());
  }
  AdapterConfig config = adapter.config;
  if (config.target_modules.empty() && config.target_modules_regex.empty()) {
    config.target_modules = io::adapted_modules(infos);
  }
  const std::string config_path = (directory / config_name).string();
  const std::string config_text = io::format_adapter_config(config, config_path);
  io::check_adapter_layout(infos, config, model_path);

  io::Metadata metadata = adapter.metadata;
  metadata["format"] = "pt";  // PEFT's loaders ask for it
  io::store_allocation(config.allocation, metadata);
  io::store_beside(adapter.beside, metadata);
  io::AdapterChecksums checksums(metadata, config_text, config_path);
  for (const io::TensorInfo& info : infos) checksums.add(info, bytes_of(tensors.at(info.name)));
  checksums.store(metadata);
  const std::string head = io::format_header(infos, metadata, model_path);
  io::FileContent model{model_name, {std::as_bytes(std::span(head))}};
  for (const io::TensorInfo& info : infos) {
    model.pieces.push_back(bytes_of(tensors.at(info.name)));
  }
  std::vector<io::FileContent> files{model, {config_name, {std::as_bytes(std::span(config_text))}}};
  for (const auto& [name, bytes] : adapter.beside)
    files.push_back({name, {std::as_bytes(std::span(bytes))}});
  io::write_file_set(directory, files);
}

}  // namespace rankwise
