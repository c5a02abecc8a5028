// read_adapter and write_adapter: tensors to and from the two files of a PEFT folder.
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/Exception.h>
#include <rankwise/adapter_file.h>

#include <array>
#include <bit>
#include <vector>

#include "adapter_config.h"
#include "adapter_layout.h"
#include "adapter_tensors.h"
#include "atomic_directory.h"
#include "message_text.h"
#include "safetensors.h"

namespace rankwise {
namespace {

namespace fs = std::filesystem;
using io::FileError;

const std::string model_name = "adapter_model.safetensors";
const std::string config_name = "adapter_config.json";

std::vector<io::File> open_adapter(const fs::path& directory) {
  try {
    return io::open_file_set(directory, std::array{model_name, config_name});
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

AdapterConfig read_config(const io::File& file) {
  if (file.size() > io::max_config_size) {
    throw FileError(file.path() + ": must be at most " + std::to_string(io::max_config_size) +
                    " bytes, got " + std::to_string(file.size()));
  }
  std::string text(file.size(), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return io::parse_adapter_config(text, file.path());
}

io::Header read_header(const io::File& file) {
  const uint64_t size = file.size();
  std::vector<std::byte> head(std::min<uint64_t>(size, 8));
  file.read(0, head);
  head.resize(8 + io::header_length(head, size, file.path()));
  file.read(0, head);
  return io::parse_header(head, size, file.path());
}

at::Tensor read_tensor(const io::File& file, const io::TensorInfo& info, uint64_t data_start) {
  const auto options = at::TensorOptions().dtype(io::tensor_dtype(info.dtype)).device(at::kCPU);
  at::Tensor tensor = at::empty(info.shape, options);
  TORCH_INTERNAL_ASSERT(tensor.nbytes() == info.end - info.begin);
  file.read(data_start + info.begin, {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()});
  if (!at::isfinite(tensor).all().item<bool>()) {
    TORCH_WARN(file.path(), ": tensor ", io::in_quotes(info.name), " has NaN or infinite values");
  }
  return tensor;
}

}  // namespace

AdapterFile read_adapter(const fs::path& directory) {
  const std::vector<io::File> files = open_adapter(directory);
  AdapterFile adapter{.config = read_config(files[1]), .tensors = {}, .metadata = {}};
  const io::Header header = read_header(files[0]);
  io::check_adapter_layout(header.tensors, adapter.config, files[0].path());
  adapter.metadata = header.metadata;
  for (const io::TensorInfo& info : header.tensors) {
    adapter.tensors.emplace(info.name, read_tensor(files[0], info, header.data_start));
  }
  return adapter;
}

void write_adapter(const fs::path& directory, const AdapterFile& adapter) {
  static_assert(std::endian::native == std::endian::little);
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
  const std::string config_text =
      io::format_adapter_config(config, (directory / config_name).string());
  io::check_adapter_layout(infos, config, model_path);

  std::map<std::string, std::string> metadata = adapter.metadata;
  metadata["format"] = "pt";  // PEFT's loaders ask for it
  const std::string head = io::format_header(infos, metadata, model_path);
  io::FileContent model{model_name, {std::as_bytes(std::span(head))}};
  for (const io::TensorInfo& info : infos) {
    const at::Tensor& tensor = tensors.at(info.name);
    model.pieces.push_back(
        {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()});
  }
  const io::FileContent config_file{config_name, {std::as_bytes(std::span(config_text))}};
  io::write_file_set(directory, std::array{model, config_file});
}

}  // namespace rankwise
