// Random damage through the loader: a mutated folder without checksums is refused with the model
// untouched, or read as an adapter that can be saved and read again.
#include <gtest/gtest.h>
#include <io/safetensors.h>
#include <rankwise/module_adapters.h>
#include <rankwise/nn.h>

#include <random>

#include "adapter_samples.h"
#include "temporary_folder.h"

namespace {

using namespace adapter_samples;
using rankwise::AdapterFile;
using rankwise::io::FileError;

/// A model that adapter_samples::lora() fits.
struct Net : torch::nn::Module {
  struct Layers : torch::nn::Module {
    Layers() {
      const auto layer = [](int64_t in, int64_t out, double alpha) {
        return rankwise::nn::LoRALinear(
            rankwise::nn::LoRALinearOptions(in, out).rank(2).alpha(alpha));
      };
      register_module("q", layer(3, 4, 3.5));
      register_module("v", layer(3, 1, 5));
    }
  };
  Net() { register_module("l", std::make_shared<Layers>()); }

  std::vector<at::Tensor> values() const {
    std::vector<at::Tensor> result;
    for (const at::Tensor& parameter : parameters()) result.push_back(parameter.detach().clone());
    return result;
  }
};

/// The bytes of a safetensors file as another program writes it: without checksums.
std::string without_metadata(const std::string& file) {
  const auto header =
      rankwise::io::parse_header(std::as_bytes(std::span(file)), file.size(), "sample");
  std::vector<rankwise::io::TensorInfo> tensors = header.tensors;
  return rankwise::io::format_header(tensors, {}, "sample") + file.substr(header.data_start);
}

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}

  size_t below(size_t limit) { return limit == 0 ? 0 : random_() % limit; }

  /// One to four small changes.
  std::string operator()(std::string text) {
    for (size_t i = 1 + below(4); i > 0; --i) change(text);
    return text;
  }

 private:
  void change(std::string& text) {
    const size_t at = below(text.size()), size = below(16);
    switch (below(6)) {
      case 0:
        if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      case 1:
        text.insert(at, 1, "{}[]:,\"\\0129-e."[below(16)]);
        break;
      case 2:
        text.erase(at, size);
        break;
      case 3:
        text.insert(below(text.size()), text.substr(at, size));
        break;
      case 4:
        replace_number(text, at);
        break;
      default:
        text.resize(at);
    }
  }

  void replace_number(std::string& text, size_t from) {
    const size_t start = text.find_first_of("0123456789", from);
    if (start == std::string::npos) return;
    const size_t end = std::min(text.find_first_not_of("0123456789", start), text.size());
    const std::array numbers = {"0", "1", "2", "8", "-1", "4294967296", "9223372036854775807"};
    text.replace(start, end - start, numbers[below(numbers.size())]);
  }

  std::mt19937 random_;
};

/// Changes the header or the bytes of a safetensors file; the header's length is kept right half of
/// the time, since few wrong ones get further.
std::string mutated_model(const std::string& file, Mutator& mutate) {
  if (mutate.below(2) == 0) return mutate(file);
  uint64_t length = 0;
  for (size_t i = 0; i < 8; ++i) length |= uint64_t{static_cast<uint8_t>(file[i])} << (8 * i);
  const std::string header = mutate(file.substr(8, length));
  std::string head(8, '\0');
  for (size_t i = 0; i < 8; ++i) head[i] = static_cast<char>(header.size() >> (8 * i));
  return head + header + file.substr(8 + length);
}

struct Outcome {
  size_t refused = 0, read = 0;
};

void try_model(const std::filesystem::path& path) {
  Net model;
  const std::vector<at::Tensor> before = model.values();
  try {
    rankwise::load_adapter(model, path);
  } catch (const FileError&) {
    const std::vector<at::Tensor> after = model.values();
    for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(at::equal(before[i], after[i]));
  }
}

void try_folder(const std::filesystem::path& path, Outcome& outcome) {
  try {
    const AdapterFile read = rankwise::read_adapter(path);
    const TemporaryFolder copy;
    rankwise::write_adapter(copy.path(), read);
    const AdapterFile again = rankwise::read_adapter(copy.path());
    for (const auto& [name, tensor] : read.tensors)
      EXPECT_TRUE(at::allclose(tensor, again.tensors.at(name), 0, 0, /*equal_nan=*/true)) << name;
    ++outcome.read;
  } catch (const FileError&) {
    ++outcome.refused;
  }
}

class Silent : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

TEST(AdapterMutation, FoldersAreRefusedOrReadWhole) {
  Silent silent;  // about values that are not finite
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  Outcome outcome;
  uint32_t seed = 0;
  for (const AdapterFile& sample : {lora(), adalora(), tricky()}) {
    const TemporaryFolder folder;
    rankwise::write_adapter(folder.path(), sample);
    const std::string model = without_metadata(folder.read(model_name));
    const std::string config = folder.read(config_name);
    for (int i = 0; i < 5000 && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE(++seed);
      Mutator mutate(seed);
      const size_t which = mutate.below(3);
      folder.write(model_name, which == 0 ? model : mutated_model(model, mutate));
      folder.write(config_name, which == 1 ? config : mutate(config));
      try_folder(folder.path(), outcome);
      try_model(folder.path());
    }
  }
  EXPECT_GT(outcome.refused, 5000u);
  EXPECT_GT(outcome.read, 500u);
}

}  // namespace
