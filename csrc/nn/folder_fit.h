// The tensors of a PEFT folder and the layers of a tree: which belongs where, and what does not
// fit.
#pragma once

#include <rankwise/adapter_file.h>
#include <torch/nn/module.h>

#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "folder_config.h"

namespace rankwise {

/// A factor, its name in the file, and the dimension its directions lie along.
struct Slot {
  std::string key;
  at::Tensor factor;
  int64_t dim;

  /// What cannot be read stays as it is, for the writer to refuse it by name.
  at::Tensor directions(int64_t first, int64_t count) const;
  std::vector<int64_t> shape(int64_t rank) const;
};

/// lora_A, lora_B and, of AdaLoRA, lora_E.
std::vector<Slot> slots_of(const PlacedAdapter& placed);

/// Compares a file with a tree's adapters and collects what does not fit.
class FitCheck {
 public:
  FitCheck(const AdapterFile& file, const torch::nn::Module& model);

  void adapter(const PlacedAdapter& placed);

  /// After all adapters. Throws io::FileError that lists all faults.
  void finish(const std::filesystem::path& directory);

 private:
  void tensor(const Slot& slot, int64_t rank);
  void surplus(const std::string& key, const at::Tensor& stored);
  const at::Tensor* base_of(const std::string& key) const;
  void fault(const std::string& what, const std::string& why);

  const AdapterFile& file_;
  const ModuleSettings settings_;
  const torch::OrderedDict<std::string, at::Tensor> parameters_;
  std::set<std::string> expected_;
  std::string faults_;
};

}  // namespace rankwise
