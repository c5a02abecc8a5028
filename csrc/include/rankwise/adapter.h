// Adapter: one low-rank update as the allocators see it, whatever module it belongs to.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/directions.h>

#include <array>
#include <functional>
#include <memory>
#include <string>

namespace rankwise {

/// The factors themselves (not copies), contiguous, and how many leading directions are active.
struct Adapter {
  std::string name;   ///< for messages, ranks and checkpoints; unique within a model
  at::Tensor lora_A;  ///< [capacity, in]
  at::Tensor lora_B;  ///< [out, capacity]
  at::Tensor lora_E;  ///< [capacity, 1] in AdaLoRA, else undefined
  int64_t rank = 0;   ///< active directions, 0 .. capacity
  /// Told the new rank when it changes; may be empty.
  std::function<void(int64_t)> set_rank = {};
  /// The rank that the adapter's layer has now, negative where it no longer has the adapter; may be
  /// empty: `rank`.
  std::function<int64_t()> rank_now = {};
  /// Shared with the layer; null where nobody asks for the order.
  std::shared_ptr<Directions> directions = {};
  /// Of the update, scaling * B diag(E) A; compared between adapters by a SpectralAllocator.
  double scaling = 1;
  /// Directions behind the active ones that compute for a step, for their gradients to be seen.
  int64_t probes = 0;

  /// lora_A, lora_B and lora_E, in this order.
  std::array<at::Tensor, 3> factors() const { return {lora_A, lora_B, lora_E}; }

  /// Sets `rank`, without probes, and tells set_rank.
  void change_rank(int64_t value) {
    rank = value;
    probe(0);
  }
  /// Sets `probes` and tells set_rank what computes.
  void probe(int64_t count) {
    probes = count;
    if (set_rank) set_rank(rank + probes);
  }
};

}  // namespace rankwise
