// A fresh folder for one test, removed with all it holds. No std::filesystem functions: libtorch.so
// exports copies of them that crash on a libstdc++ older than the one it was built with.
#pragma once

#include <dirent.h>
#include <ftw.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>

class TemporaryFolder {
 public:
  TemporaryFolder() : path_(base() / "rankwise-XXXXXX") {
    if (!::mkdtemp(path_.data())) throw std::runtime_error("mkdtemp");
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    const auto remove = [](const char* name, const struct stat*, int, struct FTW*) {
      return std::remove(name);
    };
    ::nftw(path_.c_str(), remove, 16, FTW_DEPTH | FTW_PHYS);
  }

  std::filesystem::path path() const { return path_; }

  void write(const std::string& name, const std::string& content) const {
    std::ofstream(path() / name, std::ios::binary) << content;
  }
  std::string read(const std::string& name) const {
    std::ifstream file(path() / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  /// Names of the entries, hidden ones too.
  std::set<std::string> names() const {
    std::set<std::string> result;
    DIR* folder = ::opendir(path_.c_str());
    while (const dirent* entry = ::readdir(folder)) result.insert(entry->d_name);
    ::closedir(folder);
    result.erase(".");
    result.erase("..");
    return result;
  }

 private:
  /// In memory where there is such a place: the tests sync thousands of times.
  static std::filesystem::path base() {
    return ::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : testing::TempDir();
  }

  std::string path_;
};

/// Runs `action`, which must throw an `Error`, and returns its message.
template <class Error, class Action>
std::string message_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}
