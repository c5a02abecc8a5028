// Reading takes at most twice the files' size + 64 MiB of memory, of honest and of hostile folders.
// Each folder is read in a process of its own, whose largest resident size is compared with the one
// it started from.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <rankwise/adapter_file.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <fstream>

#include "adapter_samples.h"
#include "temporary_folder.h"

namespace {

using namespace adapter_samples;

constexpr int64_t MiB = int64_t{1} << 20;

int64_t resident_bytes() {
  int64_t size = 0, pages = 0;
  std::ifstream("/proc/self/statm") >> size >> pages;
  return pages * ::sysconf(_SC_PAGESIZE);
}

struct Reading {
  bool refused = false;
  int64_t bytes = 0;  ///< of memory at the worst moment
};

/// In the child: reads, and says what it took.
Reading read_here(const std::filesystem::path& path) {
  at::set_num_threads(1);
  Reading reading;
  const int64_t start = resident_bytes();
  try {
    rankwise::read_adapter(path);
  } catch (const rankwise::io::FileError&) {
    reading.refused = true;
  }
  struct rusage usage {};
  ::getrusage(RUSAGE_SELF, &usage);
  reading.bytes = usage.ru_maxrss * 1024 - start;
  return reading;
}

Reading read_in_child(const std::filesystem::path& path) {
  std::array<int, 2> ends{};
  EXPECT_EQ(::pipe(ends.data()), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const Reading reading = read_here(path);
    ::_exit(::write(ends[1], &reading, sizeof(reading)) == sizeof(reading) ? 0 : 1);
  }
  Reading reading;
  EXPECT_EQ(::read(ends[0], &reading, sizeof(reading)), ssize_t{sizeof(reading)});
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  for (const int end : ends) ::close(end);
  return reading;
}

class AdapterMemory : public testing::Test {
 protected:
  /// Writes a safetensors file by hand: a header and zeros.
  void write_model(const std::string& json, int64_t data_size) const {
    std::string file(8, '\0');
    for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(json.size() >> (8 * i));
    folder_.write(model_name, file + json + std::string(data_size, '\0'));
  }

  void expect_bounded(bool refused) const {
    int64_t size = 0;
    for (const std::string& name : {model_name, config_name})
      size += std::ifstream(folder_.path() / name, std::ios::ate).tellg();
    const Reading reading = read_in_child(folder_.path());
    EXPECT_EQ(reading.refused, refused);
    EXPECT_LE(reading.bytes, 2 * size + 64 * MiB) << "of files of " << size << " bytes";
  }

  /// `count` items of a list, each `item` with its number in the place of '#'.
  static std::string items(int64_t count, const std::string& item) {
    const size_t place = item.find('#');
    std::string text;
    for (int64_t i = 0; i < count; ++i) {
      text += i ? "," : "";
      text += item.substr(0, place) + std::to_string(i) + item.substr(place + 1);
    }
    return text;
  }

  const TemporaryFolder folder_;
};

const std::string lora_config = R"({"peft_type": "LORA", "r": 1})";

TEST_F(AdapterMemory, OneLargeTensor) {
  rankwise::AdapterFile file;
  file.config.rank = 8;
  file.tensors = {{prefix + "q.lora_A.weight", at::ones({8, 4 * MiB}, at::kBFloat16)},
                  {prefix + "q.lora_B.weight", at::ones({1, 8}, at::kBFloat16)}};
  rankwise::write_adapter(folder_.path(), file);
  expect_bounded(false);
}

TEST_F(AdapterMemory, ManySmallTensors) {
  const std::string none = R"("shape":[1,0],"dtype":"F32","data_offsets":[0,0]})";
  for (const int64_t modules : {16000, 100'000}) {
    const std::string A = R"("base_model.model.#.lora_A.weight":{)" + none;
    const std::string B =
        R"("base_model.model.#.lora_B.weight":{"shape":[0,1],)" + none.substr(none.find("\"dtype"));
    write_model("{" + items(modules, A) + "," + items(modules, B) + "}", 0);
    folder_.write(config_name, lora_config);
    expect_bounded(modules == 100'000);
  }
}

TEST_F(AdapterMemory, ManyMetadata) {
  write_model(R"({"__metadata__":{)" + items(1'000'000, R"("#":"")") + "}}", 0);
  folder_.write(config_name, lora_config);
  expect_bounded(true);
}

TEST_F(AdapterMemory, LongNamesAndShapes) {
  std::string zeros = "0";
  for (int i = 1; i < 64; ++i) zeros += ",0";
  write_model(
      "{" + items(30000, R"("#":{"dtype":"F32","data_offsets":[0,0],"shape":[)" + zeros + "]}") +
          "}",
      0);
  folder_.write(config_name, lora_config);
  expect_bounded(true);
  write_model("{" +
                  items(1500, "\"#" + std::string(60000, 'x') +
                                  R"(":{"dtype":"F32","data_offsets":[0,0],"shape":[0]})") +
                  "}",
              0);
  expect_bounded(true);
}

TEST_F(AdapterMemory, ConfigurationsOfManyValues) {
  write_model("{}", 0);
  const auto repeated = [](const std::string& item) {
    std::string text = item;
    while (text.size() + item.size() + 64 < 4 * MiB) text += "," + item;
    return text;
  };
  for (const std::string& value :
       {"[" + repeated("0") + "]", "[" + repeated("{}") + "]", "[" + repeated("[]") + "]",
        "[" + repeated("[0]") + "]", "[" + repeated("{\"\":0}") + "]", "[" + repeated("\"\"") + "]",
        "{" + items(360'000, "\"#\":0") + "}"}) {
    folder_.write(config_name, R"({"peft_type":"LORA","x":)" + value + "}");
    SCOPED_TRACE(value.substr(0, 20));
    expect_bounded(true);
  }
}

}  // namespace
