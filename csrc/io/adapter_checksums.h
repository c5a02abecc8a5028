// Checksums in the safetensors metadata of an adapter: of its tensors, its configuration, and files
// that were saved beside it.
// PEFT and other readers ignore them. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "safetensors.h"

namespace rankwise::io {

using Metadata = std::map<std::string, std::string>;

/// What the checksums say of a folder's content.
class AdapterChecksums {
 public:
  /// Of these metadata, their own checksums apart, and of the text of an adapter_config.json:
  /// every value of its JSON but base_model_name_or_path and revision, which say where the base
  /// model lies and may be edited. Throws FileError naming `config_file` when it is not JSON.
  AdapterChecksums(const Metadata& metadata, std::string_view config,
                   const std::string& config_file);

  /// Takes a tensor in; the order does not count, nor does the place in the file.
  void add(const TensorInfo& tensor, std::span<const std::byte> bytes);

  /// Puts the checksums into the metadata to be written.
  void store(Metadata& metadata) const;

  /// Compares with the metadata that were read. Throws FileError when they have other checksums, or
  /// one without the other, naming the file that differs.
  void verify(const Metadata& metadata, const std::string& model_file) const;

 private:
  std::string config_file_;
  uint64_t config_ = 0;
  uint64_t tensors_ = 0;
};

/// False in what other programs, which know no checksums, wrote.
bool has_checksums(const Metadata& metadata);
/// Those of files beside the adapter too.
void remove_checksums(Metadata& metadata);

/// Notes files that are saved beside an adapter in its metadata.
void store_beside(const std::map<std::string, std::string>& files, Metadata& metadata);
/// Throws FileError naming `file` unless its bytes are those that the adapter was saved with.
void verify_beside(const Metadata& metadata, const std::string& name, std::string_view bytes,
                   const std::string& file);

}  // namespace rankwise::io
