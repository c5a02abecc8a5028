// Reading an allocator's state: what is wrong with it, all at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <set>
#include <string>
#include <vector>

namespace rankwise {

at::Tensor number(int64_t value);  // 0-d
at::Tensor number(double value);

// More steps than a training has; fewer than overflow when they are counted on.
constexpr int64_t many_steps = int64_t{1} << 60;

class StateCheck {
 public:
  StateCheck(std::string owner, const std::map<std::string, at::Tensor>& state)
      : owner_(std::move(owner)), state_(state) {}

  // A tensor of this dtype and shape; -1 for any size.
  void tensor(const std::string& name, at::ScalarType dtype, const std::vector<int64_t>& shape);
  // A tensor of these values.
  void equal(const std::string& name, const at::Tensor& wanted);
  // Integers that are there, and are of this range.
  void within(const std::string& name, int64_t lowest, int64_t highest);
  // Numbers that are there, none of them infinite or NaN.
  void finite(const std::string& name);
  // The first size of a tensor that is there and can be read; -1 where it is not.
  int64_t rows(const std::string& name) const;
  void fault(const std::string& line);
  // Throws std::invalid_argument, listing the faults, when there are any or something is left over.
  void finish();

 private:
  const std::string owner_;
  const std::map<std::string, at::Tensor>& state_;
  std::set<std::string> expected_, faults_;
  std::string lines_;
};

}  // namespace rankwise
