// Small adapters for tests of the file layer, and how to compare what is read with them.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <rankwise/adapter_file.h>

#include <algorithm>
#include <string>

namespace adapter_samples {

inline const std::string model_name = "adapter_model.safetensors";
inline const std::string config_name = "adapter_config.json";
inline const std::string prefix = "base_model.model.";

inline at::Tensor values(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) {
  return at::arange(1, 1 + c10::multiply_integers(shape)).view(shape).to(dtype).div(8);
}

inline rankwise::AdapterFile lora() {
  rankwise::AdapterFile file;
  file.config.rank = 2;
  file.config.alpha = 3.5;
  file.config.dropout = 0.1;
  file.config.target_modules = {"q", "v"};
  file.config.alpha_pattern = {{"v", 5}};
  file.metadata = {{"format", "pt"}};
  file.tensors = {{prefix + "l.q.lora_A.weight", values({2, 3})},
                  {prefix + "l.q.lora_B.weight", values({4, 2})},
                  {prefix + "l.v.lora_A.weight", values({2, 3}, at::kBFloat16)},
                  {prefix + "l.v.lora_B.weight", values({1, 2}, at::kHalf)}};
  return file;
}

inline rankwise::AdapterFile adalora() {
  rankwise::AdapterFile file;
  file.config.peft_type = "ADALORA";
  file.config.rank = 3;
  file.config.alpha = 7;
  file.config.target_modules = {"q", "dead"};
  file.config.kept_directions = {{"q", {true, false, true}}, {"dead", {false, false, false}}};
  file.config.allocation =
      rankwise::AllocationSettings{.target_rank = 1, .total_steps = 9, .min_rank = 1};
  file.metadata = {{"format", "pt"}};
  file.tensors = {
      {prefix + "q.lora_A", values({2, 4})},    {prefix + "q.lora_B", values({5, 2})},
      {prefix + "q.lora_E", values({2, 1})},    {prefix + "dead.lora_A", values({0, 7})},
      {prefix + "dead.lora_B", values({3, 0})}, {prefix + "dead.lora_E", values({0, 1})}};
  return file;
}

/// A header that is hard to read: escapes, names beyond ASCII, scalars, empty tensors, metadata
/// that look like tensors, and free texts in the configuration.
inline rankwise::AdapterFile tricky() {
  rankwise::AdapterFile file;
  file.config.rank = 1;
  file.config.rank_pattern = {{"\u00e9mb", 0}};
  file.config.target_modules_regex = ".*(\"|\\\\)?";
  file.config.base_model_name_or_path = "a \"b\"\n\u00e9";
  file.config.task_type = "{}";
  file.metadata = {{"format", "pt"}, {"{\"dtype\":\"F32\"}", "\\\"\t\u20ac"}, {"", ""}};
  file.tensors = {{prefix + "\"\\.lora_A.weight", values({1, 2})},
                  {prefix + "\"\\.lora_B.weight", values({1, 1}, at::kDouble)},
                  {prefix + "\u00e9mb.lora_embedding_A", values({0, 3})},
                  {prefix + "\u00e9mb.lora_embedding_B", values({2, 0})},
                  {prefix + "head.scale", values({}, at::kDouble)},
                  {prefix + "head.empty", values({0, 5, 1}, at::kHalf)}};
  return file;
}

inline bool same_tensors(const rankwise::AdapterFile& a, const rankwise::AdapterFile& b) {
  const auto same = [](const auto& one, const auto& other) {
    return one.first == other.first && one.second.scalar_type() == other.second.scalar_type() &&
           at::equal(one.second, other.second);
  };
  return std::equal(a.tensors.begin(), a.tensors.end(), b.tensors.begin(), b.tensors.end(), same);
}

}  // namespace adapter_samples
