// Reading and writing PEFT's LoRA and AdaLoRA folders: adapter_config.json +
// adapter_model.safetensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/adapter_config.h>
#include <rankwise/adapter_key.h>
#include <rankwise/file_error.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace rankwise {

/// The content of an adapter folder.
struct AdapterFile {
  AdapterConfig config;
  /// By name as in the file (see AdapterKey). Float64, float32, float16 or bfloat16.
  std::map<std::string, at::Tensor> tensors;
  /// The safetensors `__metadata__`, e.g. {"format": "pt"}, without checksums and without what
  /// they hold of config.allocation.
  std::map<std::string, std::string> metadata;
  /// {name: bytes} of further files, which change together with the two.
  std::map<std::string, std::string> beside = {};
};

/// Reads a folder written by this library or by PEFT. The tensors are fresh contiguous CPU tensors.
///
/// Every byte is treated as hostile: memory is at most twice the files' size + 64 MiB, no pickle is
/// read. Each module must have lora_A [rank, in] and lora_B [out, rank] (or the two lora_embedding
/// tensors; in an AdaLoRA folder also lora_E [rank, 1]) with rank = config.rank_of(module); all
/// that is wrong is listed in one error. Tensors that are not factors are returned as they are:
/// whether the model wants them only the model can tell. TORCH_WARN reports a tensor with NaN or
/// Inf, and options in force (not null, false or empty) that are none of PEFT 0.21's.
///
/// What write_adapter saved carries checksums of the tensors and of the configuration: whatever
/// differs is refused, apart from base_model_name_or_path and revision, which may be edited.
/// Folders of other programs have none and are taken as they are. While another process saves, and
/// after a save that was killed, the previous or the new adapter is read, never a mixture; the
/// folder is not modified. `beside` names further files of the same save to read: one that is
/// missing, damaged or of another save is refused. Throws io::FileError (path, wanted, got).
AdapterFile read_adapter(const std::filesystem::path& directory,
                         const std::vector<std::string>& beside = {});

/// Writes a folder that PEFT and read_adapter load; creates it if missing and leaves other files in
/// it alone.
///
/// Tensors may be on any device and have any strides. The same input gives the same bytes. The
/// safetensors metadata get checksums (see read_adapter), which other readers ignore. Without
/// target modules in the config, the adapted modules are named there. All files change together: a
/// process killed at any moment leaves the old or the new adapter, an error leaves the old one. One
/// writer at a time: a second one gets an error. Throws io::FileError (path, wanted, got), also for
/// a name in `beside` that is a path, hidden, or one of the adapter's own.
void write_adapter(const std::filesystem::path& directory, const AdapterFile& adapter);

}  // namespace rankwise
