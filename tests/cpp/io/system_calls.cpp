// System calls that change files, with a fault at a chosen one.
#include "system_calls.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <utility>

namespace {

bool counting = false;
std::vector<std::string> calls;
size_t fault_at = 0;  // 0: no fault
int fault_error = 0;  // 0: the process ends
int read_error = 0;   // 0: no fault

std::string awaited_name;
std::function<void()> awaited_action;

/// Counts a call; true when it must fail, with errno set. `before_the_end` runs when the process
/// ends here.
template <class Action>
bool fault(const char* name, const Action& before_the_end) {
  if (!counting) return false;
  calls.emplace_back(name);
  if (calls.size() != fault_at) return false;
  if (fault_error == 0) {
    before_the_end();
    ::_exit(system_calls::killed_status);
  }
  errno = fault_error;
  return true;
}

bool fault(const char* name) {
  return fault(name, [] {});
}

void plan(int at, int error) {
  calls.clear();
  fault_at = static_cast<size_t>(at);
  fault_error = error;
  counting = true;
}

}  // namespace

namespace system_calls {

void kill_at(int at) {
  plan(at, 0);
}
void fail_at(int at, int error) {
  plan(at, error);
}
std::vector<std::string> stop() {
  counting = false;
  return std::move(calls);
}

void fail_read(int error) {
  read_error = error;
}

void before_open(const std::string& name, std::function<void()> action) {
  awaited_name = name;
  awaited_action = std::move(action);
}

}  // namespace system_calls

extern "C" {

ssize_t write(int descriptor, const void* bytes, size_t count) {
  const auto half = [&] { ::syscall(SYS_write, descriptor, bytes, count / 2); };
  return fault("write", half) ? -1 : ::syscall(SYS_write, descriptor, bytes, count);
}

ssize_t pread(int descriptor, void* bytes, size_t count, off_t offset) {
  errno = std::exchange(read_error, 0);
  return errno != 0 ? -1 : ::syscall(SYS_pread64, descriptor, bytes, count, offset);
}

int fsync(int descriptor) {
  return fault("fsync") ? -1 : static_cast<int>(::syscall(SYS_fsync, descriptor));
}

int openat(int directory, const char* name, int flags, ...) {
  mode_t mode = 0;
  if ((flags & O_CREAT) != 0) {
    va_list arguments;
    va_start(arguments, flags);
    mode = va_arg(arguments, mode_t);
    va_end(arguments);
    if (fault("create")) return -1;
  } else if (awaited_action && name == awaited_name) {
    std::exchange(awaited_action, nullptr)();
  }
  return static_cast<int>(::syscall(SYS_openat, directory, name, flags, mode));
}

int renameat(int from_directory, const char* from, int to_directory, const char* to) noexcept {
  return fault("rename") ? -1
                         : static_cast<int>(
                               ::syscall(SYS_renameat2, from_directory, from, to_directory, to, 0));
}

int unlinkat(int directory, const char* name, int flags) noexcept {
  return fault("unlink") ? -1 : static_cast<int>(::syscall(SYS_unlinkat, directory, name, flags));
}

int mkdir(const char* name, mode_t mode) noexcept {
  return fault("mkdir") ? -1 : static_cast<int>(::syscall(SYS_mkdirat, AT_FDCWD, name, mode));
}

}  // extern "C"
