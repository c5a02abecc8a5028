// Saving and loading a set of two small files, and processes that die while they save.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "io/atomic_directory.h"
#include "system_calls.h"
#include "temporary_folder.h"

namespace file_set {

inline const std::array<std::string, 2> names = {"model", "config"};
inline const std::set<std::string> finished = {"model", "config"};

/// The contents of both files.
using Set = std::array<std::string, 2>;
inline const Set old_set = {"old model, 123456789", "old config"};
inline const Set new_set = {"new model", "new config, longer"};
inline const Set third_set = {"third model", "third config"};

inline void save(const std::filesystem::path& path, const Set& set) {
  std::vector<rankwise::io::FileContent> files;
  for (size_t i = 0; i < names.size(); ++i) {
    const auto bytes = std::as_bytes(std::span(set[i]));
    files.push_back({names[i], {bytes.first(3), bytes.subspan(3)}});
  }
  rankwise::io::write_file_set(path, files);
}

inline Set load(const std::filesystem::path& path) {
  const auto files = rankwise::io::open_file_set(path, names);
  Set set;
  for (size_t i = 0; i < names.size(); ++i) {
    set[i].resize(files[i].size());
    files[i].read(0, std::as_writable_bytes(std::span(set[i])));
  }
  return set;
}

/// Runs `action` in a child process and returns its exit status; 1 when it threw.
template <class Action>
int in_child(const Action& action) {
  const pid_t child = ::fork();
  if (child == 0) {
    try {
      action();
    } catch (...) {
      ::_exit(1);
    }
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// Saves in a child that dies at system call `at`; false when the save ended before.
inline bool killed_save(const std::filesystem::path& path, const Set& set, int at) {
  const int status = in_child([&] {
    system_calls::kill_at(at);
    save(path, set);
  });
  EXPECT_TRUE(status == 0 || status == system_calls::killed_status) << status;
  return status == system_calls::killed_status;
}

/// The call right after the one that makes a save valid.
inline int first_call_after_valid() {
  const TemporaryFolder folder;
  save(folder.path(), old_set);
  system_calls::fail_at(0, 0);
  save(folder.path(), new_set);
  const std::vector<std::string> calls = system_calls::stop();
  return static_cast<int>(std::find(calls.begin(), calls.end(), "rename") - calls.begin()) + 2;
}

/// Leaves a save interrupted as soon as the new set is valid, before any file has been renamed.
inline void interrupt_valid_save(const TemporaryFolder& folder) {
  static const int at = first_call_after_valid();
  save(folder.path(), old_set);
  ASSERT_TRUE(killed_save(folder.path(), new_set, at));
  ASSERT_EQ(load(folder.path()), new_set);
  ASSERT_EQ(folder.read("model"), old_set[0]);
  ASSERT_EQ(folder.read("config"), old_set[1]);
}

}  // namespace file_set
