// Digests of decisions, and who differs in them.
#include "group_decision.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <functional>

namespace rankwise {
namespace {

std::vector<int64_t> each(const std::vector<Standing>& all, int64_t Standing::*member) {
  std::vector<int64_t> values;
  for (const Standing& one : all) values.push_back(one.*member);
  return values;
}

std::string counts(const std::vector<Standing>& all) {
  std::string text;
  for (size_t i = 0; i < all.size(); ++i) {
    text += (i == 0 ? "process " : ", process ") + std::to_string(i) + ": " +
            std::to_string(all[i].steps) + " and " + std::to_string(all[i].skipped_steps);
  }
  return text;
}

}  // namespace

Digest& Digest::add(int64_t value) {
  add_bytes(&value, sizeof(value));
  return *this;
}

Digest& Digest::add(const std::string& text) {
  add(static_cast<int64_t>(text.size()));
  add_bytes(text.data(), text.size());
  return *this;
}

Digest& Digest::add(const at::Tensor& values) {
  const at::Tensor own = values.contiguous();
  add(own.numel());
  add_bytes(own.const_data_ptr(), own.nbytes());
  return *this;
}

void Digest::add_bytes(const void* bytes, size_t count) {
  const auto* const byte = static_cast<const unsigned char*>(bytes);
  for (size_t i = 0; i < count; ++i) value_ = (value_ ^ byte[i]) * 0x100000001b3;  // FNV-1a
}

at::Tensor Standing::tensor() const {
  return at::tensor({failed, freezes, steps, skipped_steps, budget, options, adapters}, at::kLong);
}

Standing Standing::of(const at::Tensor& tensor) {
  const auto* const value = tensor.const_data_ptr<int64_t>();
  return {value[0], value[1], value[2], value[3], value[4], value[5], value[6]};
}

std::string processes_apart(const std::vector<int64_t>& values) {
  const auto most = std::ranges::max_element(
      values, {}, [&](const int64_t& value) { return std::ranges::count(values, value); });
  std::string apart;
  int64_t count = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] == *most) continue;
    apart += (count++ == 0 ? "" : ", ") + std::to_string(i);
  }
  return count == 0 ? "" : (count == 1 ? "process " : "processes ") + apart;
}

std::string difference(const std::vector<Standing>& all) {
  const auto apart = [&](int64_t Standing::*member) { return processes_apart(each(all, member)); };
  const auto those_that = [&](int64_t Standing::*member) {
    std::string list;
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i].*member) list += (list.empty() ? "process " : ", ") + std::to_string(i);
    return list;
  };
  if (const std::string who = those_that(&Standing::failed); !who.empty())
    return who + " could not take it, as an error there says";
  if (const std::string who = apart(&Standing::options); !who.empty())
    return who + " has other options or another number of adapters";
  if (!apart(&Standing::steps).empty() || !apart(&Standing::skipped_steps).empty()) {
    return "steps taken, and skipped for gradients that are infinite or NaN, differ (" +
           counts(all) + ")";
  }
  if (!apart(&Standing::freezes).empty())
    return "freeze() was called by " + those_that(&Standing::freezes) + " alone";
  if (const std::string who = apart(&Standing::budget); !who.empty())
    return who + " has another budget";
  return "";
}

}  // namespace rankwise
