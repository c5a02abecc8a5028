// Stands between the program and the system calls that change files: counts them, and makes one of
// them fail or be the last thing the process does. Works by defining the C library's functions in
// the test program.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace system_calls {

constexpr int killed_status = 77;

/// The process ends at call number `at` (1 is the next one) with killed_status; a write has done
/// half of its bytes.
void kill_at(int at);
/// Call number `at` changes nothing and fails with `error` (an errno value).
void fail_at(int at, int error);
/// Back to normal. Returns the names of the calls since kill_at or fail_at.
std::vector<std::string> stop();

/// The next read from a file fails with `error`.
void fail_read(int error);

/// Runs `action` once, before a file of this name is opened for reading the next time.
void before_open(const std::string& name, std::function<void()> action);

}  // namespace system_calls
