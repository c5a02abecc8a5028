// Adapters as a layer holds them: the active one in the layer itself, the others as StoredAdapters.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/directions.h>
#include <rankwise/nn_options.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <array>
#include <iosfwd>
#include <memory>

namespace rankwise::nn {

/// One adapter of a layer, active or not: the factors themselves, not copies.
struct HeldAdapter {
  at::Tensor lora_A;  ///< [capacity, in]
  at::Tensor lora_B;  ///< [out, capacity]
  at::Tensor lora_E;  ///< [capacity, 1] in AdaLoRA, else undefined
  AdapterSettings settings = {};
  int64_t rank = 0;                             ///< leading directions in use
  std::shared_ptr<Directions> directions = {};  ///< where an allocator may change them

  int64_t capacity() const { return lora_A.defined() ? lora_A.size(0) : 0; }
  double scaling() const { return lora_A.defined() ? settings.scaling() : 0; }
  /// lora_A, lora_B and lora_E, in this order.
  std::array<at::Tensor, 3> factors() const { return {lora_A, lora_B, lora_E}; }
};

/// An adapter that is not active: its factors are frozen parameters of their usual names, so that
/// they move, are cloned and are saved with the layer.
class StoredAdapterImpl : public torch::nn::Cloneable<StoredAdapterImpl> {
 public:
  explicit StoredAdapterImpl(HeldAdapter adapter);

  /// For clone(): registers new factors like the present ones, their values not set.
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

  HeldAdapter held;

 private:
  void register_factors();
};

TORCH_MODULE(StoredAdapter);

}  // namespace rankwise::nn
