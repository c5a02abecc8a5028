// Files that are written and read together with an adapter: round trips, kills, other saves' files.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/adapter_file.h>
#include <sys/wait.h>
#include <unistd.h>

#include "adapter_samples.h"
#include "system_calls.h"
#include "temporary_folder.h"

namespace {

using namespace adapter_samples;
using rankwise::AdapterFile;
using rankwise::read_adapter;
using rankwise::write_adapter;
using rankwise::io::FileError;
using testing::HasSubstr;

const std::vector<std::string> beside = {"state.bin", "state.json"};

AdapterFile with_state(const std::string& text, double alpha = 3.5) {
  AdapterFile file = lora();
  file.config.alpha = alpha;
  file.beside = {{"state.bin", std::string("\0\xff", 2) + text}, {"state.json", text}};
  return file;
}

std::string read_error(const TemporaryFolder& folder) {
  return message_of<FileError>([&] { read_adapter(folder.path(), beside); });
}

TEST(AdapterBeside, RoundTrip) {
  const TemporaryFolder folder;
  const AdapterFile file = with_state("first");
  write_adapter(folder.path(), file);
  const AdapterFile read = read_adapter(folder.path(), beside);
  EXPECT_EQ(read.beside, file.beside);
  EXPECT_EQ(read.metadata, file.metadata);
  EXPECT_TRUE(read_adapter(folder.path()).beside.empty());
  EXPECT_EQ(read_adapter(folder.path(), {"state.json"}).beside.at("state.json"), "first");
}

TEST(AdapterBeside, KillAtEveryCallLeavesOldOrNew) {
  int olds = 0, news = 0;
  for (int at = 1;; ++at) {
    const TemporaryFolder folder;
    write_adapter(folder.path(), with_state("first"));
    const pid_t child = ::fork();
    if (child == 0) {
      system_calls::kill_at(at);
      write_adapter(folder.path(), with_state("second", 99));
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    const AdapterFile read = read_adapter(folder.path(), beside);
    const bool renewed = read.config.alpha == 99;
    EXPECT_EQ(read.beside, with_state(renewed ? "second" : "first").beside) << "call " << at;
    EXPECT_EQ(read_adapter(folder.path()).config.alpha, read.config.alpha) << "call " << at;
    ++(renewed ? news : olds);
    if (WEXITSTATUS(status) != system_calls::killed_status) break;
    ASSERT_LT(at, 100);
  }
  EXPECT_GE(olds, 20);
  EXPECT_GE(news, 8);
}

TEST(AdapterBeside, FilesOfAnotherSaveAreRefused) {
  const TemporaryFolder folder;
  write_adapter(folder.path(), lora());
  EXPECT_THAT(read_error(folder), HasSubstr("state.bin: no such file"));
  write_adapter(folder.path(), with_state("first"));
  write_adapter(folder.path(), lora());
  EXPECT_THAT(read_error(folder), HasSubstr("state.bin: damaged, or not of the save"));
  write_adapter(folder.path(), with_state("second"));
  folder.write("state.json", "first");
  EXPECT_THAT(read_error(folder), HasSubstr("state.json: damaged, or not of the save"));
  EXPECT_EQ(read_adapter(folder.path(), {"state.bin"}).beside.size(), 1);
}

TEST(AdapterBeside, NamesAreTheirOwn) {
  for (const std::string name : {"", "a/b", ".hidden", "adapter_config.json"}) {
    const TemporaryFolder folder;
    AdapterFile file = lora();
    file.beside = {{name, "text"}};
    const std::string message = message_of<FileError>([&] { write_adapter(folder.path(), file); });
    EXPECT_THAT(message, HasSubstr("must have a name of its own")) << name;
    EXPECT_TRUE(folder.names().empty());
  }
}

}  // namespace
