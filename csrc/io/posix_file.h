// Files of one directory through POSIX calls: owned descriptors, complete reads and writes, errors
// with the path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <utility>

namespace rankwise::io {

/// What tells one content from another: size and a checksum against accidents, not against forgery.
struct FileState {
  uint64_t size = 0;
  uint64_t checksum = 0;
  bool operator==(const FileState&) const = default;
};

/// An open file with its path. All members throw FileError "PATH: cannot ...: REASON".
class File {
 public:
  File(File&& other) noexcept
      : descriptor_(std::exchange(other.descriptor_, -1)), path_(std::move(other.path_)) {}
  File& operator=(File&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    std::swap(path_, other.path_);
    return *this;
  }
  ~File();

  const std::string& path() const { return path_; }
  uint64_t size() const;

  /// Fills `into` from `offset`; a file that ends before is an error.
  void read(uint64_t offset, std::span<std::byte> into) const;
  /// Writes all bytes at the end of what was written so far.
  void write(std::span<const std::byte> bytes);
  /// Returns when the content is on the disk (for a directory: its entries).
  void sync() const;
  FileState state() const;
  /// Device and inode: whether two open files are one.
  std::pair<uint64_t, uint64_t> identity() const;

 private:
  friend class Directory;
  File(int descriptor, std::string path) : descriptor_(descriptor), path_(std::move(path)) {}
  [[noreturn]] void fail(const std::string& action) const;

  int descriptor_ = -1;
  std::string path_;
};

/// An open directory; `name` is always the name of a file directly in it.
class Directory {
 public:
  explicit Directory(const std::filesystem::path& path);

  const std::string& path() const { return file_.path(); }
  std::string path_of(const std::string& name) const;

  /// Opens a regular file for reading; nullopt when there is none.
  std::optional<File> open(const std::string& name) const;
  /// Creates an empty file in place of any file or link of that name (which is removed, not
  /// followed).
  File create(const std::string& name) const;
  void rename(const std::string& from, const std::string& to) const;
  /// Removes a file; its absence is no error.
  void remove(const std::string& name) const;
  void sync() const { file_.sync(); }
  /// Keeps other writers out until this object or the process ends. Throws when one is in.
  void lock() const;

 private:
  File file_;
};

}  // namespace rankwise::io
