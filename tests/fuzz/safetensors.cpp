// Fuzzes the safetensors header and the layout of adapter tensors.
#include "io/safetensors.h"

#include <rankwise/adapter_key.h>
#include <rankwise/file_error.h>

#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "io/adapter_layout.h"

namespace {

using namespace rankwise::io;
using rankwise::AdapterConfig;

std::optional<Header> parsed(std::span<const std::byte> head, uint64_t file_size) {
  try {
    return parse_header(head, file_size, "F");
  } catch (const FileError& error) {
    check(std::string_view(error.what()).starts_with("F: "), "an error names its file");
    return std::nullopt;
  }
}

void check_cover(const Header& header, uint64_t file_size) {
  uint64_t position = header.data_start;
  std::set<std::string_view> names;
  for (const TensorInfo& tensor : header.tensors) {
    check(header.data_start + tensor.begin == position, "no overlap, no hole");
    check(tensor.begin <= tensor.end, "sizes are not negative");
    check(names.insert(tensor.name).second, "names are distinct");
    position = header.data_start + tensor.end;
  }
  check(position == file_size, "the whole file is covered");
}

void check_written(Header header) {
  const std::string text = format_header(header.tensors, header.metadata, "F");
  const uint64_t end = header.tensors.empty() ? 0 : header.tensors.back().end;
  const auto again = parsed(std::as_bytes(std::span(text)), text.size() + end);
  check(again && again->metadata == header.metadata, "what is written is read: metadata");
  const auto same = [](const TensorInfo& a, const TensorInfo& b) {
    return a.name == b.name && a.dtype == b.dtype && a.shape == b.shape;
  };
  const auto by_name = [](const TensorInfo& a, const TensorInfo& b) { return a.name < b.name; };
  std::vector<TensorInfo> read = again->tensors;
  std::sort(header.tensors.begin(), header.tensors.end(), by_name);
  std::sort(read.begin(), read.end(), by_name);
  check(std::equal(read.begin(), read.end(), header.tensors.begin(), header.tensors.end(), same),
        "what is written is read: tensors");
}

void check_keys(const Header& header) {
  for (const TensorInfo& tensor : header.tensors) {
    const auto key = rankwise::parse_adapter_key(tensor.name);
    check(!key || to_string(*key) == tensor.name, "a key is the inverse of its name");
  }
}

std::array<AdapterConfig, 2> configs() {
  AdapterConfig lora;
  lora.rank = 2;
  lora.rank_pattern = {{"q", 1}, {"l.[0-9]+.v", 3}};
  AdapterConfig adalora;
  adalora.peft_type = "ADALORA";
  adalora.rank = 2;
  adalora.kept_directions = {{"q", {true, false}}};
  return {lora, adalora};
}

void try_header(std::span<const std::byte> head, uint64_t file_size) {
  static const auto adapters = configs();
  const auto header = parsed(head, file_size);
  if (!header) return;
  check_cover(*header, file_size);
  check_written(*header);
  check_keys(*header);
  for (const AdapterConfig& config : adapters) {
    try {
      check_adapter_layout(header->tensors, config, "F");
    } catch (const FileError&) {
    }
  }
}

}  // namespace

/// The input as a whole file; and its first 8 bytes as the size of the data after a header that is
/// the rest, so that mutations need not guess lengths.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = std::as_bytes(std::span(data, size));
  try_header(file, size);
  if (size < 8) return 0;
  std::vector<std::byte> head(file.begin(), file.end());
  uint64_t data_size = 0;
  for (size_t i = 0; i < 8; ++i) {
    data_size |= uint64_t{data[i]} << (8 * i);
    head[i] = static_cast<std::byte>((size - 8) >> (8 * i));
  }
  data_size %= uint64_t{1} << 62;
  try_header(head, size + data_size);
  return 0;
}
