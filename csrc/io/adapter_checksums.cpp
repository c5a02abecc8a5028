// The checksums of an adapter folder.
#include "adapter_checksums.h"

#include <rankwise/file_error.h>

#include <array>
#include <cstdio>

#include "bounded_json.h"
#include "checksum.h"

namespace rankwise::io {
namespace {

const std::string config_key = "rankwise.config_checksum";
const std::string tensors_key = "rankwise.tensors_checksum";
const std::string beside_key = "rankwise.beside.";  // and the file's name

std::string to_text(uint64_t checksum) {
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(checksum));
  return text.data();
}

uint64_t config_checksum(std::string_view text, const std::string& file) {
  nlohmann::json json = parse_json_object(text, file).value;
  for (const char* free : {"base_model_name_or_path", "revision"}) json.erase(free);
  Checksum checksum;
  checksum.add(json.dump());  // keys sorted, numbers in their shortest form
  return checksum.value();
}

}  // namespace

AdapterChecksums::AdapterChecksums(const Metadata& metadata, std::string_view config,
                                   const std::string& config_file)
    : config_file_(config_file), config_(config_checksum(config, config_file)) {
  for (const auto& [key, value] : metadata) {
    if (key == config_key || key == tensors_key) continue;
    Checksum checksum;
    checksum.add(key);
    checksum.add(value);
    tensors_ += checksum.value();
  }
}

void AdapterChecksums::add(const TensorInfo& tensor, std::span<const std::byte> bytes) {
  Checksum checksum;
  checksum.add(tensor.name);
  checksum.add(dtype_name(tensor.dtype));
  for (const int64_t size : tensor.shape) checksum.add(static_cast<uint64_t>(size));
  checksum.add(bytes);
  tensors_ += checksum.value();
}

void AdapterChecksums::store(Metadata& metadata) const {
  metadata[config_key] = to_text(config_);
  metadata[tensors_key] = to_text(tensors_);
}

void AdapterChecksums::verify(const Metadata& metadata, const std::string& model_file) const {
  const auto check = [&](const std::string& key, uint64_t found, const std::string& file) {
    const auto stored = metadata.find(key);
    if (stored != metadata.end() && stored->second == to_text(found)) return;
    throw FileError(file + ": damaged, or changed since it was saved: " + key + " must be " +
                    (stored == metadata.end() ? "present" : stored->second) + ", got " +
                    to_text(found) + "; to accept it as it is, drop the checksums in Python: " +
                    "safetensors.torch.save_file(safetensors.torch.load_file(PATH), PATH, " +
                    "{\"format\": \"pt\"}) with PATH = " + model_file);
  };
  check(tensors_key, tensors_, model_file);
  check(config_key, config_, config_file_);
}

bool has_checksums(const Metadata& metadata) {
  return metadata.contains(config_key) || metadata.contains(tensors_key);
}

void remove_checksums(Metadata& metadata) {
  std::erase_if(metadata, [](const auto& entry) {
    const std::string& key = entry.first;
    return key == config_key || key == tensors_key || key.starts_with(beside_key);
  });
}

void store_beside(const std::map<std::string, std::string>& files, Metadata& metadata) {
  for (const auto& [name, bytes] : files) {
    Checksum checksum;
    checksum.add(bytes);
    metadata[beside_key + name] = to_text(checksum.value());
  }
}

void verify_beside(const Metadata& metadata, const std::string& name, std::string_view bytes,
                   const std::string& file) {
  const auto stored = metadata.find(beside_key + name);
  Checksum checksum;
  checksum.add(bytes);
  const std::string found = to_text(checksum.value());
  if (stored != metadata.end() && stored->second == found) return;
  throw FileError(file + ": damaged, or not of the save that wrote the adapter beside it: " +
                  beside_key + name + " in the adapter must be " + found + ", got " +
                  (stored == metadata.end() ? "none" : stored->second));
}

}  // namespace rankwise::io
