// Options of the adapted layers, with chained setters as in torch::nn.
#pragma once

#include <c10/core/ScalarType.h>
#include <rankwise/allocation_settings.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace rankwise::nn {

/// How an adapter starts. In each the update is zero.
enum class LoRAInit {
  kaiming,   ///< lora_A Kaiming-uniform as torch::nn::Linear's weight, lora_B zero
  gaussian,  ///< lora_A normal with standard deviation 1 / rank, lora_B zero
  swapped,   ///< lora_A zero, lora_B normal with 1 / rank; of an embedding with 1
};

/// One layer's adapter.
struct AdapterSettings {
  int64_t rank = 8;     ///< directions used at the start, >= 0
  double alpha = 16;    ///< finite
  double dropout = 0;   ///< probability in [0, 1] for the adapter's input, in training mode
  bool rslora = false;  ///< scaling by alpha / sqrt(rank) (arXiv 2312.03732)
  std::optional<LoRAInit> init;     ///< default: kaiming in linear layers, swapped in embeddings
  std::optional<int64_t> capacity;  ///< directions allocated, >= rank; default: rank
  /// Of the factors: the base's, or float over a 16-bit base, which is the default there.
  std::optional<at::ScalarType> adapter_dtype;
  bool triplets = false;  ///< with lora_E, as AdaLoRA
  /// AdaLoRA's schedule where a RankAllocator or a folder gave it; it goes into saved folders.
  std::optional<AllocationSettings> allocation;

  /// alpha / rank, or alpha / sqrt(rank) with rslora; 0 for rank 0.
  double scaling() const;

  /// Throws std::invalid_argument naming the setting, what was wanted and what came.
  void check() const;
};

/// The setters and getters that every options class has; meaning and defaults in AdapterSettings.
template <class Options>
class AdapterArguments {
 public:
#define RANKWISE_ADAPTER_ARG(T, name)                   \
  Options& name(T value) {                              \
    settings_.name = std::move(value);                  \
    return static_cast<Options&>(*this);                \
  }                                                     \
  const decltype(AdapterSettings::name)& name() const { \
    return settings_.name;                              \
  }
  RANKWISE_ADAPTER_ARG(int64_t, rank)
  RANKWISE_ADAPTER_ARG(double, alpha)
  RANKWISE_ADAPTER_ARG(double, dropout)
  RANKWISE_ADAPTER_ARG(bool, rslora)
  RANKWISE_ADAPTER_ARG(LoRAInit, init)
  RANKWISE_ADAPTER_ARG(int64_t, capacity)
  RANKWISE_ADAPTER_ARG(at::ScalarType, adapter_dtype)
#undef RANKWISE_ADAPTER_ARG

  const AdapterSettings& settings() const {
    return settings_;
  }

 private:
  AdapterSettings settings_;
};

/// An adapter around a layer that is there already.
class AdapterOptions : public AdapterArguments<AdapterOptions> {};

/// A new LoRALinear or AdaLoRALinear.
class LoRALinearOptions : public AdapterArguments<LoRALinearOptions> {
 public:
  LoRALinearOptions(int64_t in_features, int64_t out_features)
      : in_features_(in_features), out_features_(out_features) {}

  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(bool, bias) = true;
};

/// A new LoRAEmbedding; its dropout must be 0, for indices cannot be dropped.
class LoRAEmbeddingOptions : public AdapterArguments<LoRAEmbeddingOptions> {
 public:
  LoRAEmbeddingOptions(int64_t num_embeddings, int64_t embedding_dim)
      : num_embeddings_(num_embeddings), embedding_dim_(embedding_dim) {}

  TORCH_ARG(int64_t, num_embeddings);
  TORCH_ARG(int64_t, embedding_dim);
  TORCH_ARG(std::optional<int64_t>, padding_idx) = std::nullopt;
};

}  // namespace rankwise::nn
