// Files of one directory through POSIX calls.
#include "posix_file.h"

#include <fcntl.h>
#include <rankwise/file_error.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <system_error>
#include <vector>

#include "checksum.h"

namespace rankwise::io {
namespace {

[[noreturn]] void fail_with(const std::string& path, const std::string& action, int error) {
  throw FileError(path + ": cannot " + action + ": " + std::generic_category().message(error));
}

}  // namespace

File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void File::fail(const std::string& action) const {
  fail_with(path_, action, errno);
}

uint64_t File::size() const {
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0) fail("stat");
  return static_cast<uint64_t>(status.st_size);
}

std::pair<uint64_t, uint64_t> File::identity() const {
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0) fail("stat");
  return {status.st_dev, status.st_ino};
}

void File::read(uint64_t offset, std::span<std::byte> into) const {
  constexpr size_t most = size_t{1} << 30;  // Linux moves at most 2^31 - 4096 bytes per call
  while (!into.empty()) {
    const ssize_t done =
        ::pread(descriptor_, into.data(), std::min(into.size(), most), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail("read");
    if (done == 0) throw FileError(path_ + ": cannot read: it became shorter meanwhile");
    into = into.subspan(static_cast<size_t>(done));
    offset += static_cast<uint64_t>(done);
  }
}

void File::write(std::span<const std::byte> bytes) {
  constexpr size_t most = size_t{1} << 30;
  while (!bytes.empty()) {
    const ssize_t done = ::write(descriptor_, bytes.data(), std::min(bytes.size(), most));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail("write");
    bytes = bytes.subspan(static_cast<size_t>(done));
  }
}

void File::sync() const {
  // Some file systems have no fsync on directories and answer EINVAL.
  if (::fsync(descriptor_) != 0 && errno != EINVAL) fail("sync");
}

FileState File::state() const {
  Checksum checksum;
  const uint64_t total = size();
  std::vector<std::byte> block(std::min<uint64_t>(total, uint64_t{1} << 20));  // whole words
  for (uint64_t offset = 0; offset < total; offset += block.size()) {
    const auto part = std::span(block).first(std::min<uint64_t>(block.size(), total - offset));
    read(offset, part);
    checksum.add(part);
  }
  return {.size = total, .checksum = checksum.value()};
}

Directory::Directory(const std::filesystem::path& path) : file_(-1, path.string()) {
  file_.descriptor_ = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file_.descriptor_ < 0) file_.fail("open the folder");
}

std::string Directory::path_of(const std::string& name) const {
  return (std::filesystem::path(path()) / name).string();
}

std::optional<File> Directory::open(const std::string& name) const {
  // O_NONBLOCK: opening a pipe must not wait for its other end.
  const int descriptor =
      ::openat(file_.descriptor_, name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0 && errno == ENOENT) return std::nullopt;
  File file(descriptor, path_of(name));
  if (descriptor < 0) file.fail("open");
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) file.fail("stat");
  if (!S_ISREG(status.st_mode)) throw FileError(file.path() + ": must be a regular file");
  return file;
}

File Directory::create(const std::string& name) const {
  remove(name);
  File file(::openat(file_.descriptor_, name.c_str(),
                     O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666),
            path_of(name));
  if (file.descriptor_ < 0) file.fail("create");
  return file;
}

void Directory::rename(const std::string& from, const std::string& to) const {
  if (::renameat(file_.descriptor_, from.c_str(), file_.descriptor_, to.c_str()) != 0) {
    fail_with(path_of(to), "replace", errno);
  }
}

void Directory::remove(const std::string& name) const {
  if (::unlinkat(file_.descriptor_, name.c_str(), 0) != 0 && errno != ENOENT) {
    fail_with(path_of(name), "remove", errno);
  }
}

void Directory::lock() const {
  // File systems without locks (some network ones) answer other errors: then there is no
  // protection.
  if (::flock(file_.descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    throw FileError(path() + ": cannot save: another process is saving into this folder");
  }
}

}  // namespace rankwise::io
