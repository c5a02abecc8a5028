// Reading an allocator's state.
#include "state_check.h"

#include <ATen/ATen.h>
#include <rankwise/tensor_memory.h>

#include <iomanip>
#include <sstream>
#include <stdexcept>

namespace rankwise {
namespace {

std::string text_of(const at::Tensor& tensor) {
  std::ostringstream text;
  if (tensor.dim() == 0 && at::isIntegralType(tensor.scalar_type(), /*includeBool=*/true)) {
    text << tensor.item<int64_t>();
  } else if (tensor.dim() == 0) {
    text << std::setprecision(17) << tensor.item<double>();
  } else {
    text << tensor.scalar_type() << " " << tensor.sizes();
  }
  return text.str();
}

}  // namespace

at::Tensor number(int64_t value) {
  return at::scalar_tensor(value, at::kLong);
}

at::Tensor number(double value) {
  return at::scalar_tensor(value, at::kDouble);
}

int64_t StateCheck::rows(const std::string& name) const {
  const auto it = state_.find(name);
  const bool readable =
      it != state_.end() && it->second.defined() && kind_without_memory(it->second).empty();
  return readable && it->second.dim() > 0 ? it->second.size(0) : -1;
}

void StateCheck::tensor(const std::string& name, at::ScalarType dtype,
                        const std::vector<int64_t>& shape) {
  expected_.insert(name);
  const auto it = state_.find(name);
  if (it == state_.end()) return fault(name + ": missing");
  const at::Tensor& got = it->second;
  const std::string kind = got.defined() ? kind_without_memory(got) : "";
  if (!kind.empty()) return fault(name + ": must be dense, with data, got " + kind);
  bool fits = got.defined() && got.scalar_type() == dtype &&
              got.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i)
    fits = shape[i] == -1 || got.size(static_cast<int64_t>(i)) == shape[i];
  if (fits) return;
  std::ostringstream wanted;
  wanted << name << ": must be " << dtype << " " << at::IntArrayRef(shape) << ", got "
         << (got.defined() ? text_of(got) : "none");
  fault(wanted.str());
}

void StateCheck::equal(const std::string& name, const at::Tensor& wanted) {
  tensor(name, wanted.scalar_type(), wanted.sizes().vec());
  const auto it = state_.find(name);
  if (it == state_.end() || faults_.contains(name)) return;
  if (!it->second.cpu().equal(wanted))
    fault(name + ": must be " + text_of(wanted) + ", got " + text_of(it->second));
}

void StateCheck::within(const std::string& name, int64_t lowest, int64_t highest) {
  const auto it = state_.find(name);
  if (it == state_.end() || faults_.contains(name) || it->second.numel() == 0) return;
  const auto least = it->second.min().item<int64_t>(), most = it->second.max().item<int64_t>();
  if (least >= lowest && most <= highest) return;
  fault(name + ": must be from " + std::to_string(lowest) + " to " + std::to_string(highest) +
        ", got " + std::to_string(least < lowest ? least : most));
}

void StateCheck::finite(const std::string& name) {
  const auto it = state_.find(name);
  if (it == state_.end() || faults_.contains(name)) return;
  const at::Tensor wrong = it->second.masked_select(it->second.isfinite().logical_not());
  if (wrong.numel() > 0) fault(name + ": must be finite, got " + text_of(wrong[0]));
}

void StateCheck::finish() {
  for (const auto& [name, tensor] : state_) {
    if (!expected_.contains(name)) fault(name + ": not expected");
  }
  if (!lines_.empty())
    throw std::invalid_argument(owner_ + ": the state is not this allocator's:" + lines_);
}

void StateCheck::fault(const std::string& line) {
  faults_.insert(line.substr(0, line.find(':')));
  lines_ += "\n  " + line;
}

}  // namespace rankwise
