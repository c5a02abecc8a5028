// What the processes of a group decided, as integers: who differs, and in what.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace rankwise {

// 64 bits of a sequence of values, of all their bits.
class Digest {
 public:
  Digest& add(int64_t value);
  Digest& add(const std::string& text);
  Digest& add(const at::Tensor& values);  // on the CPU
  int64_t value() const { return static_cast<int64_t>(value_); }

 private:
  void add_bytes(const void* bytes, size_t count);

  uint64_t value_ = 0xcbf29ce484222325;
};

// Where a process stands in a step, without its adapters.
struct Standing {
  int64_t failed = 0;  // it threw, and decided nothing
  int64_t freezes = 0, steps = 0, skipped_steps = 0, budget = -1;
  int64_t options = 0, adapters = 0;  // digests

  at::Tensor tensor() const;  // int64 [7]
  static Standing of(const at::Tensor& tensor);
};

// How the standings differ but for their adapters; empty where they do not.
std::string difference(const std::vector<Standing>& all);

// "process 2", "processes 0, 2": those whose value is not that of most, of equals the first's;
// empty where all are equal.
std::string processes_apart(const std::vector<int64_t>& values);

}  // namespace rankwise
