// The path's setting, and the timing of calls with their own operands.
#include "path_choice.h"

#include <ATen/Context.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <compare>
#include <limits>
#include <map>
#include <mutex>

namespace rankwise {
namespace {

std::atomic<CpuPath> current = CpuPath::micro_kernel;

// Calls that share a choice.
struct Kind {
  Pass pass;
  at::ScalarType base, factors;
  int64_t tokens, in, out, rank;
  bool dropout;

  auto operator<=>(const Kind&) const = default;
};
std::mutex mutex;
std::map<Kind, PathTimes> timed;  // guarded by mutex

std::string dtype_name(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : "bfloat16";
}

double milliseconds(const std::function<void(bool)>& run, bool panels) {
  const auto start = std::chrono::steady_clock::now();
  run(panels);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

// The least times of three calls on each path, after one of each that does not count.
PathTimes time_both(const std::function<void(bool)>& run) {
  constexpr int turns = 3;
  constexpr double none = std::numeric_limits<double>::infinity();
  PathTimes result{none, none};
  for (int turn = 0; turn <= turns; ++turn) {
    for (const bool panels : {true, false}) {
      double& least = panels ? result.micro_kernel_ms : result.aten_ms;
      const double time = milliseconds(run, panels);
      if (turn > 0) least = std::min(least, time);
    }
  }
  return result;
}

MeasuredPath described(const Kind& kind, const PathTimes& times) {
  std::string dtype = dtype_name(kind.base);
  if (kind.factors != kind.base) dtype += ", " + dtype_name(kind.factors);
  const char* const call = kind.pass == Pass::forward ? "forward" : "backward";
  return {times, call, dtype, kind.tokens, kind.in, kind.out, kind.rank, kind.dropout};
}

}  // namespace

void set_cpu_path(CpuPath path) {
  current = path;
}

CpuPath cpu_path() {
  return current;
}

CpuPath path_in_effect() {
  const CpuPath path = current;
  const bool fixed = path == CpuPath::measured && at::globalContext().deterministicAlgorithms();
  return fixed ? CpuPath::micro_kernel : path;
}

const char* name_of(CpuPath path) {
  switch (path) {
    case CpuPath::micro_kernel:
      return "micro-kernel";
    case CpuPath::aten:
      return "ATen";
    case CpuPath::measured:
      return "measured";
  }
  return "";
}

std::vector<MeasuredPath> measured_paths() {
  const std::lock_guard lock(mutex);
  std::vector<MeasuredPath> result;
  for (const auto& [kind, times] : timed) result.push_back(described(kind, times));
  return result;
}

bool panels_chosen(Pass pass, const ActiveAdapter& adapter, const at::Tensor& x,
                   const std::function<void(bool)>& run) {
  const CpuPath path = path_in_effect();
  if (path != CpuPath::measured) return path == CpuPath::micro_kernel;
  const auto tokens = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(x.size(0))));
  const Kind kind{pass,      x.scalar_type(),   adapter.dtype(), tokens,
                  x.size(1), adapter.B.size(0), adapter.rank(),  adapter.dropout.active()};
  {
    const std::lock_guard lock(mutex);
    if (const auto found = timed.find(kind); found != timed.end())
      return found->second.chosen() == CpuPath::micro_kernel;
  }
  const PathTimes times = time_both(run);
  const std::lock_guard lock(mutex);  // the first of several threads' timings counts
  return timed.emplace(kind, times).first->second.chosen() == CpuPath::micro_kernel;
}

}  // namespace rankwise
