// A set of files replaced as one: other programs' writes, concurrent readers and writers, links.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/file_error.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

#include "file_set.h"
#include "system_calls.h"
#include "temporary_folder.h"

namespace {

using namespace file_set;
using rankwise::io::FileError;
using testing::HasSubstr;

TEST(AtomicDirectory, WritesReadsAndLeavesOnlyTheFiles) {
  const TemporaryFolder folder;
  save(folder.path() / "a" / "b", old_set);
  EXPECT_EQ(load(folder.path() / "a" / "b"), old_set);
  folder.write("other", "untouched");
  save(folder.path(), old_set);
  save(folder.path(), new_set);
  EXPECT_EQ(load(folder.path()), new_set);
  EXPECT_EQ(folder.names(), (std::set<std::string>{"a", "config", "model", "other"}));
}

TEST(AtomicDirectory, AnInterruptedSaveCanBeCopied) {
  const TemporaryFolder folder;
  interrupt_valid_save(folder);
  const TemporaryFolder copy;
  for (const std::string& name : folder.names()) copy.write(name, folder.read(name));
  EXPECT_EQ(load(copy.path()), new_set);
}

TEST(AtomicDirectory, FilesOfOtherProgramsCountAfterAnInterruptedSave) {
  const TemporaryFolder folder;
  interrupt_valid_save(folder);
  folder.write("model", third_set[0]);
  EXPECT_EQ(load(folder.path()), (Set{third_set[0], old_set[1]}));
  folder.write("config", third_set[1]);
  EXPECT_EQ(load(folder.path()), third_set);
  save(folder.path(), old_set);
  EXPECT_EQ(load(folder.path()), old_set);
  EXPECT_EQ(folder.names(), finished);
}

TEST(AtomicDirectory, RemovedFilesStayRemovedAfterAnInterruptedSave) {
  const TemporaryFolder folder;
  interrupt_valid_save(folder);
  ASSERT_EQ(std::remove((folder.path() / "model").c_str()), 0);
  EXPECT_THAT(message_of<FileError>([&] { load(folder.path()); }),
              HasSubstr("model: no such file"));
}

TEST(AtomicDirectory, DamagedStagedFilesAreNotRead) {
  const TemporaryFolder folder;
  interrupt_valid_save(folder);
  folder.write(".rankwise-save.config", "garbage");
  EXPECT_EQ(load(folder.path()), old_set);
}

TEST(AtomicDirectory, GarbageJournalIsAnError) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  for (const std::string text : {"", "[]", "{\"files\": 3}", "{\"files\": [{\"name\": 1}]}",
                                 "{\"files\": [{\"name\": \"../x\", \"written\": {\"size\": 1, "
                                 "\"checksum\": 2}, \"replaced\": null}]}"}) {
    folder.write(".rankwise-save.json", text);
    EXPECT_THAT(message_of<FileError>([&] { load(folder.path()); }),
                HasSubstr(".rankwise-save.json: "));
  }
}

TEST(AtomicDirectory, OneWriterAtATime) {
  const TemporaryFolder folder;
  const rankwise::io::Directory other(folder.path());
  other.lock();
  EXPECT_THAT(message_of<FileError>([&] { save(folder.path(), new_set); }),
              HasSubstr("another process is saving"));
}

TEST(AtomicDirectory, ReadersNeverSeeAMixtureWhileAnotherProcessSaves) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  const pid_t writer = ::fork();
  if (writer == 0) {
    for (int i = 0; i < 300; ++i) save(folder.path(), i % 2 == 0 ? new_set : old_set);
    ::_exit(0);
  }
  int status = 0;
  int reads = 0;
  while (::waitpid(writer, &status, WNOHANG) == 0) {
    const Set set = load(folder.path());
    ASSERT_TRUE(set == old_set || set == new_set) << set[0] << ", " << set[1];
    ++reads;
  }
  EXPECT_EQ(status, 0);
  EXPECT_GT(reads, 0);
}

TEST(AtomicDirectory, AReaderStartsAgainWhenASaveEndsUnderIt) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  system_calls::before_open("config", [&] { save(folder.path(), new_set); });
  EXPECT_EQ(load(folder.path()), new_set);
}

TEST(AtomicDirectory, AReaderStartsAgainWhenASaveIsInterruptedUnderIt) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  system_calls::before_open("model", [&] {
    killed_save(folder.path(), new_set, first_call_after_valid() + 2);
    EXPECT_EQ(folder.read("model"), new_set[0]);
    EXPECT_EQ(folder.read("config"), old_set[1]);
  });
  EXPECT_EQ(load(folder.path()), new_set);
}

TEST(AtomicDirectory, AFolderThatKeepsChangingIsAnError) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  const std::function<void()> change = [&] {
    folder.write("next", "another model");
    std::rename((folder.path() / "next").c_str(), (folder.path() / "model").c_str());
    system_calls::before_open("model", change);
  };
  system_calls::before_open("model", change);
  EXPECT_THAT(message_of<FileError>([&] { load(folder.path()); }),
              HasSubstr("cannot read: the folder keeps changing"));
  system_calls::before_open("", {});
  EXPECT_EQ(load(folder.path()), (Set{"another model", old_set[1]}));
}

TEST(AtomicDirectory, AFileThatBecomesShorterIsAnError) {
  const TemporaryFolder folder;
  folder.write("f", "abcd");
  const auto file = rankwise::io::Directory(folder.path()).open("f");
  folder.write("f", "ab");
  std::array<std::byte, 4> bytes;
  EXPECT_THAT(message_of<FileError>([&] { file->read(0, bytes); }),
              HasSubstr("/f: cannot read: it became shorter meanwhile"));
}

TEST(AtomicDirectory, LinksAreReplacedNotFollowed) {
  const TemporaryFolder folder;
  const TemporaryFolder elsewhere;
  elsewhere.write("victim", "untouched");
  for (const char* name : {"model", ".rankwise-save.model", ".rankwise-save.journal"}) {
    ASSERT_EQ(::symlink((elsewhere.path() / "victim").c_str(), (folder.path() / name).c_str()), 0);
  }
  save(folder.path(), new_set);
  EXPECT_EQ(load(folder.path()), new_set);
  EXPECT_EQ(elsewhere.read("victim"), "untouched");
  EXPECT_EQ(folder.names(), finished);
}

TEST(AtomicDirectory, OnlyRegularFilesAreRead) {
  const TemporaryFolder folder;
  EXPECT_THAT(message_of<FileError>([&] { load(folder.path() / "none"); }),
              HasSubstr("/none: cannot open the folder"));
  EXPECT_THAT(message_of<FileError>([&] { load(folder.path()); }),
              HasSubstr("/model: no such file"));
  folder.write("config", "c");
  ASSERT_EQ(::mkdir((folder.path() / "model").c_str(), 0755), 0);
  EXPECT_THAT(message_of<FileError>([&] { load(folder.path()); }),
              HasSubstr("must be a regular file"));
  ASSERT_EQ(std::remove((folder.path() / "model").c_str()), 0);
  ASSERT_EQ(::mkfifo((folder.path() / "model").c_str(), 0600), 0);
  EXPECT_THAT(message_of<FileError>([&] { load(folder.path()); }),
              HasSubstr("must be a regular file"));
}

TEST(AtomicDirectory, FoldersThatCannotBeMade) {
  const TemporaryFolder folder;
  folder.write("file", "");
  ASSERT_EQ(::symlink("nowhere", (folder.path() / "link").c_str()), 0);
  for (const char* name : {"file", "file/a", "link", "link/a/b"}) {
    EXPECT_THAT(message_of<FileError>([&] { save(folder.path() / name, new_set); }),
                HasSubstr(folder.path().string()));
  }
  EXPECT_THAT(message_of<FileError>([] { save("", new_set); }),
              HasSubstr("cannot create the folder"));
  save(folder.path() / "a" / "b" / "", new_set);
  EXPECT_EQ(load(folder.path() / "a" / "b"), new_set);
}

TEST(FileState, EveryByteAndTheLengthCount) {
  const TemporaryFolder folder;
  std::string content(2000, 'a');
  const auto state = [&] {
    folder.write("f", content);
    return rankwise::io::Directory(folder.path()).open("f")->state();
  };
  const auto start = state();
  EXPECT_EQ(state(), start);
  for (size_t i = 0; i < content.size(); i += 7) {
    content[i] = static_cast<char>(content[i] ^ 0x80);
    EXPECT_NE(state(), start) << i;
    content[i] = static_cast<char>(content[i] ^ 0x80);
  }
  // Two flipped sign bits must not cancel.
  content[7] = content[15] = static_cast<char>('a' ^ 0x80);
  EXPECT_NE(state(), start);
  content.assign(2000, 'a');
  content += '\0';
  EXPECT_NE(state(), start);
}

}  // namespace
