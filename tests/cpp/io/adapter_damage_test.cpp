// Damaged folders: every prefix and every flipped bit of three small adapters is an error or the
// original content.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <functional>

#include "adapter_samples.h"
#include "temporary_folder.h"

namespace {

using namespace adapter_samples;
using rankwise::AdapterFile;
using rankwise::read_adapter;
using rankwise::write_adapter;
using rankwise::io::FileError;
using testing::HasSubstr;

class Damage : public testing::TestWithParam<std::function<AdapterFile()>> {
 protected:
  Damage() : original_(GetParam()()) { write_adapter(folder_.path(), original_); }

  /// Reads the folder with one file replaced: true when refused; otherwise it must be the original.
  bool refused(const std::string& name, const std::string& content) const {
    folder_.write(name, content);
    try {
      expect_original(read_adapter(folder_.path()));
      return false;
    } catch (const FileError& error) {
      EXPECT_THAT(error.what(), HasSubstr(folder_.path().string()));
      return true;
    }
  }

  size_t refused_prefixes(const std::string& name) const {
    const std::string whole = folder_.read(name);
    size_t count = 0;
    for (size_t size = 0; size < whole.size() && !HasFailure(); ++size) {
      SCOPED_TRACE(name + " cut to " + std::to_string(size) + " bytes");
      count += refused(name, whole.substr(0, size));
    }
    folder_.write(name, whole);
    return count;
  }

  size_t refused_flips(const std::string& name) const {
    const std::string whole = folder_.read(name);
    size_t count = 0;
    for (size_t bit = 0; bit < 8 * whole.size() && !HasFailure(); ++bit) {
      SCOPED_TRACE(name + " with bit " + std::to_string(bit) + " flipped");
      std::string flipped = whole;
      flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
      count += refused(name, flipped);
    }
    folder_.write(name, whole);
    return count;
  }

  size_t size_of(const std::string& name) const { return folder_.read(name).size(); }

  const TemporaryFolder folder_;

 private:
  /// Where the base model lies may be edited: no checksum covers it.
  void expect_original(AdapterFile read) const {
    read.config.base_model_name_or_path = original_.config.base_model_name_or_path;
    read.config.revision = original_.config.revision;
    EXPECT_EQ(read.config, original_.config);
    EXPECT_EQ(read.metadata, original_.metadata);
    EXPECT_TRUE(same_tensors(read, original_));
  }

  const AdapterFile original_;
};

TEST_P(Damage, UndamagedItIsTheOriginal) {
  for (const std::string& name : {model_name, config_name})
    EXPECT_FALSE(refused(name, folder_.read(name)));
}

TEST_P(Damage, EveryPrefix) {
  EXPECT_EQ(refused_prefixes(model_name), size_of(model_name));
  EXPECT_EQ(refused_prefixes(config_name), size_of(config_name) - 1);  // all but the last newline
}

TEST_P(Damage, EveryFlippedBitOfTheTensors) {
  // What is not refused turns one kind of white space into another, or a letter into its escape.
  EXPECT_GE(refused_flips(model_name), 8 * size_of(model_name) - 32);
}

TEST_P(Damage, EveryFlippedBitOfTheConfiguration) {
  EXPECT_GE(refused_flips(config_name), 6 * size_of(config_name));
}

constexpr std::array names = {"LoRA", "AdaLoRA", "Tricky"};
INSTANTIATE_TEST_SUITE_P(Adapters, Damage, testing::Values(lora, adalora, tricky),
                         [](const auto& info) { return names[info.index]; });

/// What reading says after one edit of the configuration.
std::string error_after(const std::string& from, const std::string& to) {
  const TemporaryFolder folder;
  write_adapter(folder.path(), lora());
  std::string config = folder.read(config_name);
  config.replace(config.find(from), from.size(), to);
  folder.write(config_name, config);
  try {
    read_adapter(folder.path());
  } catch (const FileError& error) {
    return error.what();
  }
  return "";
}

TEST(AdapterChecksums, AnEditedConfigurationIsNamedWithTheWayOut) {
  const std::string error = error_after("3.5", "4.5");
  EXPECT_THAT(error, HasSubstr("adapter_config.json: damaged, or changed since it was saved: "
                               "rankwise.config_checksum must be "));
  EXPECT_THAT(error, HasSubstr("drop the checksums in Python"));
}

TEST(AdapterChecksums, WhereTheBaseModelLiesMayBeEdited) {
  EXPECT_EQ(error_after("\"base_model_name_or_path\": null",
                        "\"base_model_name_or_path\": \"org/model\""),
            "");
  EXPECT_EQ(error_after("\"revision\": null", "\"revision\": \"main\""), "");
}

TEST(AdapterChecksums, SwappedFilesAreRefused) {
  const TemporaryFolder one, other;
  write_adapter(one.path(), lora());
  AdapterFile changed = lora();
  changed.config.alpha = 99;
  write_adapter(other.path(), changed);
  one.write(config_name, other.read(config_name));
  EXPECT_THAT(message_of<FileError>([&] { read_adapter(one.path()); }),
              HasSubstr("rankwise.config_checksum must be "));
}

TEST(AdapterChecksums, StaleOnesAreReplaced) {
  AdapterFile file = lora();
  file.metadata["rankwise.tensors_checksum"] = "0123456789abcdef";
  const TemporaryFolder folder;
  write_adapter(folder.path(), file);
  EXPECT_EQ(read_adapter(folder.path()).metadata, lora().metadata);
}

}  // namespace
