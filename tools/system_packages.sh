#!/bin/sh
# Makes sure that the compiler, make's friends, GoogleTest, Chromium, pgrep, libFuzzer, clang's coverage and Valgrind are
# there: installs what is missing as root on Debian and Ubuntu, and otherwise says in one sentence which command does.
# Usage: tools/system_packages.sh build|test|fuzz|coverage|bench
set -eu

missing=""
need() { # package, test
  if ! sh -c "$2" >/dev/null 2>&1; then missing="$missing $1"; fi
}

need g++ 'command -v g++ || command -v clang++'
need python3-venv 'python3 -c "import ensurepip, venv"'
need python3-dev 'python3 -c "import os, sysconfig; assert os.path.exists(os.path.join(sysconfig.get_paths()[\"include\"], \"Python.h\"))"'
if [ "${1:-build}" = test ]; then
  need chromium 'command -v chromium || command -v chromium-browser'
  need procps 'command -v pgrep'
  need libgtest-dev 'ls /usr/include/gtest/gtest.h /usr/local/include/gtest/gtest.h | grep -q .'
fi
if [ "${1:-build}" = fuzz ]; then
  fuzzer='echo "extern \"C\" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }" |
    clang++ -x c++ -fsanitize=fuzzer,address - -o /dev/null'
  need clang 'command -v clang++'
  need libclang-rt-dev "$fuzzer"
fi
if [ "${1:-build}" = coverage ]; then
  counting='echo "int main() {}" | clang++-16 -x c++ -fprofile-instr-generate - -o /dev/null'
  need clang-16 'command -v clang++-16'
  need llvm-16 'command -v llvm-cov-16'
  need libclang-rt-16-dev "$counting"
fi
if [ "${1:-build}" = bench ]; then
  need valgrind 'command -v valgrind && ls /usr/include/valgrind/callgrind.h'
fi

[ -z "$missing" ] && exit 0
command="apt-get install -y --no-install-recommends$missing"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "installing system packages:$missing" >&2
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive $command
else
  echo "missing system packages; install them with: sudo $command" >&2
  exit 1
fi
