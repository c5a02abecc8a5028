// The path's setting, and the timing of calls with their own operands.
#include "path_choice.h"

#include <ATen/Context.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

namespace rankwise {
namespace {

std::atomic<CpuPath> current = CpuPath::micro_kernel;

using Kind =
    std::tuple<Pass, at::ScalarType, at::ScalarType, int64_t, int64_t, int64_t, int64_t, bool>;
std::mutex mutex;
std::map<Kind, MeasuredPath> timed;  // guarded by mutex

std::string dtype_name(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : "bfloat16";
}

double milliseconds(const std::function<void(bool)>& run, bool panels) {
  const auto start = std::chrono::steady_clock::now();
  run(panels);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

// Sets the least times of three calls on each path, after one of each that does not count.
void time_both(const std::function<void(bool)>& run, MeasuredPath& result) {
  constexpr int turns = 3;
  result.micro_kernel_ms = result.aten_ms = std::numeric_limits<double>::infinity();
  for (int turn = 0; turn <= turns; ++turn) {
    for (const bool panels : {true, false}) {
      double& least = panels ? result.micro_kernel_ms : result.aten_ms;
      const double time = milliseconds(run, panels);
      if (turn > 0) least = std::min(least, time);
    }
  }
}

}  // namespace

void set_cpu_path(CpuPath path) {
  current = path;
}

CpuPath cpu_path() {
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
  for (const auto& [kind, path] : timed) result.push_back(path);
  return result;
}

bool panels_chosen(Pass pass, const ActiveAdapter& adapter, const at::Tensor& x,
                   const at::Tensor& weight, const std::function<void(bool)>& run) {
  const CpuPath path = cpu_path();
  if (path != CpuPath::measured) return path == CpuPath::micro_kernel;
  const auto tokens = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(x.size(0))));
  const Kind kind(pass, x.scalar_type(), adapter.dtype(), tokens, weight.size(1), weight.size(0),
                  adapter.rank(), adapter.dropout.active());
  {
    const std::lock_guard lock(mutex);
    if (const auto found = timed.find(kind); found != timed.end())
      return found->second.chosen() == CpuPath::micro_kernel;
  }
  std::string dtype = dtype_name(x.scalar_type());
  if (adapter.dtype() != x.scalar_type()) dtype += ", " + dtype_name(adapter.dtype());
  MeasuredPath result{pass == Pass::forward ? "forward" : "backward",
                      dtype,
                      tokens,
                      weight.size(1),
                      weight.size(0),
                      adapter.rank(),
                      adapter.dropout.active(),
                      0,
                      0};
  time_both(run, result);
  const std::lock_guard lock(mutex);  // the first of several threads' timings counts
  return timed.emplace(kind, result).first->second.chosen() == CpuPath::micro_kernel;
}

}  // namespace rankwise
