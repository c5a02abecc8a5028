// The options and states of torch::optim's optimizers as named tensors.
#pragma once

#include <torch/optim/optimizer.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "training_tensors.h"

namespace rankwise {

/// "AdamW", for example. Throws std::invalid_argument for an optimizer whose state is not known.
std::string optimizer_kind(const std::string& owner, const torch::optim::Optimizer& optimizer);

/// `group.<number>.<option>` and `state.<field>.<parameter>`; numbers are tensors of their type.
NamedTensors optimizer_state(const torch::optim::Optimizer& optimizer,
                             const TrainingTensors& parameters);

/// An optimizer_state() that was read for an optimizer of the same kind, groups and parameters, and
/// is not in it yet.
class ReadOptimizer {
 public:
  ReadOptimizer(const NamedTensors& stored, const torch::optim::Optimizer& optimizer,
                const TrainingTensors& parameters, Faults& faults);

  /// Everything else in the optimizer is forgotten.
  void put_into(torch::optim::Optimizer& optimizer);

 private:
  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> options_;
  std::vector<std::pair<void*, std::unique_ptr<torch::optim::OptimizerParamState>>> states_;
};

}  // namespace rankwise
