// A set of files replaced as one: kills and failures at every system call, limits, the order of
// syncs.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rankwise/file_error.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>

#include "file_set.h"
#include "system_calls.h"
#include "temporary_folder.h"

namespace {

using namespace file_set;
using rankwise::io::FileError;
using testing::HasSubstr;

TEST(AtomicDirectoryFaults, KillAtEveryCallLeavesOldOrNew) {
  int olds = 0;
  int news = 0;
  for (int at = 1;; ++at) {
    const TemporaryFolder folder;
    save(folder.path(), old_set);
    const bool killed = killed_save(folder.path(), new_set, at);
    const Set set = load(folder.path());
    ASSERT_TRUE(set == old_set || set == new_set)
        << "call " << at << ": " << set[0] << ", " << set[1];
    ++(set == old_set ? olds : news);
    save(folder.path(), third_set);
    EXPECT_EQ(load(folder.path()), third_set);
    EXPECT_EQ(folder.names(), finished);
    if (!killed) break;
  }
  EXPECT_GE(olds, 10);
  EXPECT_GE(news, 6);
}

TEST(AtomicDirectoryFaults, KillOfTheFirstSaveLeavesNothingOrAll) {
  int complete = 0;
  for (int at = 1;; ++at) {
    const TemporaryFolder folder;
    const std::filesystem::path path = folder.path() / "adapter";
    const bool killed = killed_save(path, new_set, at);
    try {
      EXPECT_EQ(load(path), new_set) << "call " << at;
      ++complete;
    } catch (const FileError&) {
      EXPECT_EQ(complete, 0) << "call " << at;
    }
    if (!killed) break;
  }
  EXPECT_GE(complete, 6);
}

TEST(AtomicDirectoryFaults, KillWhileCompletingAnInterruptedSave) {
  for (int at = 1;; ++at) {
    const TemporaryFolder folder;
    interrupt_valid_save(folder);
    const bool killed = killed_save(folder.path(), third_set, at);
    const Set set = load(folder.path());
    ASSERT_TRUE(set == new_set || set == third_set) << "call " << at << ": " << set[0];
    if (!killed) break;
  }
}

TEST(AtomicDirectoryFaults, FailureAtEveryCallKeepsTheOldSetAndLeavesNoFiles) {
  for (const int error : {ENOSPC, EIO, EROFS}) {
    int failures = 0;
    for (int at = 1;; ++at) {
      const TemporaryFolder folder;
      save(folder.path(), old_set);
      system_calls::fail_at(at, error);
      std::string message;
      try {
        save(folder.path(), new_set);
      } catch (const FileError& failure) {
        message = failure.what();
      }
      if (system_calls::stop().size() < static_cast<size_t>(at)) break;
      const Set set = load(folder.path());
      if (set == old_set) {
        EXPECT_THAT(message, HasSubstr(folder.path().string()));
        EXPECT_EQ(folder.names(), finished) << "call " << at;
        ++failures;
      } else {
        EXPECT_EQ(set, new_set) << "call " << at;
      }
    }
    EXPECT_GE(failures, 10);
  }
}

// A power failure keeps only what was synced: contents before names, staged names before the
// journal, the journal before the first renamed file, renamed files before the journal goes.
TEST(AtomicDirectoryFaults, SyncsStandBetweenTheSteps) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  system_calls::fail_at(0, 0);
  save(folder.path(), new_set);
  EXPECT_THAT(
      system_calls::stop(),
      testing::ElementsAre("mkdir",                                        // the folder exists
                           "unlink", "create", "write", "write", "fsync",  // staged model
                           "unlink", "create", "write", "write", "fsync",  // staged config
                           "unlink", "create", "write", "fsync", "fsync",  // staged journal, folder
                           "rename", "fsync", "rename", "rename", "fsync",  // journal, both files
                           "unlink", "fsync"));                             // journal
}

TEST(AtomicDirectoryFaults, AnInterruptedWriteGoesOn) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  system_calls::fail_at(4, EINTR);
  save(folder.path(), new_set);
  const std::vector<std::string> calls = system_calls::stop();
  EXPECT_EQ(calls[3], "write");
  EXPECT_EQ(std::ranges::count(calls, "write"), 6);
  EXPECT_EQ(load(folder.path()), new_set);
}

TEST(AtomicDirectoryFaults, AnInterruptedReadGoesOnAndAFailedOneNamesTheFile) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  system_calls::fail_read(EINTR);
  EXPECT_EQ(load(folder.path()), old_set);
  system_calls::fail_read(EIO);
  EXPECT_EQ(message_of<FileError>([&] { load(folder.path()); }),
            (folder.path() / "model").string() + ": cannot read: Input/output error");
  EXPECT_EQ(load(folder.path()), old_set);
}

TEST(AtomicDirectoryFaults, AFileSystemWithoutSyncsOfFoldersIsEnough) {
  const TemporaryFolder folder;
  system_calls::fail_at(16, EINVAL);
  save(folder.path(), new_set);
  EXPECT_EQ(system_calls::stop()[15], "fsync");
  EXPECT_EQ(load(folder.path()), new_set);
}

TEST(AtomicDirectoryFaults, FileSizeLimit) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  const int status = in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100, 100};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    save(folder.path(), {std::string(1000, 'x'), "new config"});
  });
  EXPECT_EQ(status, 1);
  EXPECT_EQ(load(folder.path()), old_set);
  EXPECT_EQ(folder.names(), finished);
}

TEST(AtomicDirectoryFaults, ReadOnlyFolder) {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  ASSERT_EQ(::chmod(folder.path().c_str(), 0555), 0);
  const int status = in_child([&] {
    if (::getuid() == 0 && ::setuid(65534) != 0) ::_exit(2);  // root may write anywhere
    const std::string message = message_of<FileError>([&] { save(folder.path(), new_set); });
    EXPECT_THAT(message, HasSubstr(folder.path().string() + "/"));
    EXPECT_THAT(message, HasSubstr("Permission denied"));
    ::_exit(testing::Test::HasFailure() ? 1 : 0);
  });
  EXPECT_EQ(status, 0);
  ASSERT_EQ(::chmod(folder.path().c_str(), 0755), 0);
  EXPECT_EQ(load(folder.path()), old_set);
  EXPECT_EQ(folder.names(), finished);
}

}  // namespace
