// Which products compute lora_linear on CPUs. Both paths are exact to rounding, and each of them
// gives the same bits in every run and for every number of threads; their last bits differ.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rankwise {

enum class CpuPath {
  micro_kernel,  ///< oneDNN's micro-kernel where it serves the types; the default
  aten,          ///< ATen's products, which are MKL's or oneDNN's
  measured,      ///< the faster of both, found at the first call of each kind
};

/// "micro-kernel", "ATen" or "measured".
const char* name_of(CpuPath path);

/// For all later calls in this process, of all threads. With `measured`, which bits a result has
/// depends on what was timed as faster, and the first call of a kind takes as long as nine. While
/// torch.use_deterministic_algorithms (at::globalContext().setDeterministicAlgorithms) is on,
/// calls take `micro_kernel` then.
void set_cpu_path(CpuPath path);

/// What was set.
CpuPath cpu_path();

/// The least of three times on each path, in milliseconds.
struct PathTimes {
  double micro_kernel_ms, aten_ms;

  CpuPath chosen() const {
    return micro_kernel_ms <= aten_ms ? CpuPath::micro_kernel : CpuPath::aten;
  }
};

/// What was timed for a kind of calls.
struct MeasuredPath : PathTimes {
  std::string call;   ///< "forward" or "backward"
  std::string dtype;  ///< of base and factors: "float32", "bfloat16", "bfloat16, float32"
  int64_t tokens;     ///< the most of the kind, a power of two
  int64_t in, out, rank;
  bool dropout;
};

/// All that was timed in this process so far.
std::vector<MeasuredPath> measured_paths();

}  // namespace rankwise
