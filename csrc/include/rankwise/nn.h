// Layers with a low-rank adapter as torch::nn modules: the base of torch::nn::Linear or Embedding,
// frozen, and trainable factors.
//
// Parameters are registered as weight, bias, lora_A, lora_B and lora_E, those of adapters that are
// not active in children adapter_<name>. From the same seed a new layer has the same values as
// Python's. set_rank, merging and adapters' names apart, all state is parameters, which clone(),
// to() and torch::save treat as in any module; a merged layer is not saved or loaded.
#pragma once

#include <rankwise/adapted.h>
#include <rankwise/nn_options.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rankwise::nn {

/// A module whose parameters are an adapted base's.
template <class Derived>
class AdaptedModule : public torch::nn::Cloneable<Derived>, public Adapted {
 public:
  /// For clone(): registers new parameters like the present ones, their values not set.
  void reset() override;
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  /// Throw c10::Error while merged: the update would be counted twice.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  /// In the order of registration.
  virtual std::vector<std::pair<const char*, at::Tensor*>> tensors();
  void register_tensors();
  void replace_tensors() override;
  void add_child(const std::string& name, const StoredAdapter& adapter) override;
  void remove_child(const std::string& name) override;
};

/// y = x W0^T + b + scaling * ((drop(x) A^T) * E^T) B^T with W0 [out, in] and b [out] frozen.
///
/// The layers below have a forward() each, for torch::nn::AnyModule and Sequential find a layer's
/// type by that of its forward().
template <class Derived>
class AdaptedLinear : public AdaptedModule<Derived> {
 public:
  at::Tensor bias;  ///< [out], or undefined

  /// Draws base and factors anew. Throws c10::Error while merged.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  bool embedding() const override { return false; }

 protected:
  AdaptedLinear(const LoRALinearOptions& options, bool triplets);
  AdaptedLinear(const torch::nn::Linear& linear, const AdapterOptions& options, bool triplets);
  std::vector<std::pair<const char*, at::Tensor*>> tensors() override;
  at::Tensor adapted(const at::Tensor& input);
};

/// LoRA (arXiv 2106.09685): no lora_E.
class LoRALinearImpl : public AdaptedLinear<LoRALinearImpl> {
 public:
  /// Throws std::invalid_argument for wrong options, here and in all constructors below.
  explicit LoRALinearImpl(const LoRALinearOptions& options) : AdaptedLinear(options, false) {}
  /// Around a linear layer: weight and bias are its very tensors, which this freezes.
  LoRALinearImpl(const torch::nn::Linear& linear, const AdapterOptions& options)
      : AdaptedLinear(linear, options, false) {}

  /// Input [..., in], result [..., out] in the input's dtype; the adapter's dropout only in
  /// training mode. Throws c10::Error for wrong shapes or dtypes (see lora_linear), and when a
  /// merged layer is to be trained.
  at::Tensor forward(const at::Tensor& input) { return adapted(input); }
};

/// AdaLoRA (arXiv 2303.10512): A and B start normal with standard deviation 0.02, E zero, as in
/// the paper's code; `init` is not used. A RankAllocator prunes it.
class AdaLoRALinearImpl : public AdaptedLinear<AdaLoRALinearImpl> {
 public:
  explicit AdaLoRALinearImpl(const LoRALinearOptions& options) : AdaptedLinear(options, true) {}
  AdaLoRALinearImpl(const torch::nn::Linear& linear, const AdapterOptions& options)
      : AdaptedLinear(linear, options, true) {}

  /// As LoRALinear's.
  at::Tensor forward(const at::Tensor& input) { return adapted(input); }
};

/// y[i] = W0[i] + scaling * A^T[i] B^T with W0 [num_embeddings, embedding_dim] frozen.
class LoRAEmbeddingImpl : public AdaptedModule<LoRAEmbeddingImpl> {
 public:
  explicit LoRAEmbeddingImpl(const LoRAEmbeddingOptions& options);
  /// Around an embedding: weight is its very tensor, which this freezes. Throws
  /// std::invalid_argument for max_norm, scale_grad_by_freq or sparse.
  LoRAEmbeddingImpl(const torch::nn::Embedding& embedding, const AdapterOptions& options);

  /// Indices of any shape, int64 or int32; result [..., embedding_dim]. Throws as LoRALinear.
  at::Tensor forward(const at::Tensor& indices);

  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  bool embedding() const override { return true; }

 protected:
  void initialise(const at::Tensor& A, const at::Tensor& B,
                  const AdapterSettings& settings) const override;

 private:
  int64_t padding_idx_ = -1;  // negative: none
};

extern template class AdaptedModule<LoRALinearImpl>;
extern template class AdaptedModule<AdaLoRALinearImpl>;
extern template class AdaptedModule<LoRAEmbeddingImpl>;
extern template class AdaptedLinear<LoRALinearImpl>;
extern template class AdaptedLinear<AdaLoRALinearImpl>;

TORCH_MODULE(LoRALinear);
TORCH_MODULE(AdaLoRALinear);
TORCH_MODULE(LoRAEmbedding);

}  // namespace rankwise::nn
