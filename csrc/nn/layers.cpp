// LoRALinear, AdaLoRALinear and LoRAEmbedding: parameters, forward, clone and moves.
#include <rankwise/nn.h>
#include <rankwise/ops.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace rankwise::nn {
namespace {

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

AdapterSettings with_triplets(AdapterSettings settings, bool triplets) {
  settings.triplets = triplets;
  return settings;
}

AdapterSettings without_dropout(const AdapterSettings& settings) {
  if (settings.dropout == 0) return settings;
  throw std::invalid_argument(
      "LoRAEmbedding: dropout must be 0, for indices cannot be dropped, got " +
      c10::str(settings.dropout));
}

// PyTorch's own value for a padding index counted from the end, or none.
int64_t padding_of(const std::optional<int64_t>& index, int64_t rows) {
  if (!index) return -1;
  if (*index < -rows || *index >= rows)
    throw std::invalid_argument("LoRAEmbedding: padding_idx must be from " + std::to_string(-rows) +
                                " to " + std::to_string(rows - 1) + ", got " +
                                std::to_string(*index));
  return *index < 0 ? *index + rows : *index;
}

}  // namespace

// What every adapted module has

template <class Derived>
std::vector<std::pair<const char*, at::Tensor*>> AdaptedModule<Derived>::tensors() {
  return {{"weight", &weight}, {"lora_A", &lora_A}, {"lora_B", &lora_B}, {"lora_E", &lora_E}};
}

template <class Derived>
void AdaptedModule<Derived>::register_tensors() {
  for (const auto& [name, tensor] : tensors())
    this->register_parameter(name, *tensor, tensor->defined() && tensor->requires_grad());
}

template <class Derived>
void AdaptedModule<Derived>::reset() {
  for (const auto& [name, tensor] : tensors()) {
    if (!tensor->defined()) continue;
    const bool trainable = tensor->requires_grad();
    *tensor = at::empty_like(tensor->detach()).requires_grad_(trainable);
  }
  register_tensors();
}

template <class Derived>
std::shared_ptr<torch::nn::Module> AdaptedModule<Derived>::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = torch::nn::Cloneable<Derived>::clone(device);
  if (merged()) {
    const torch::NoGradGuard no_grad;
    static_cast<Derived&>(*copy).base_ = base_.to(device.value_or(base_.device())).clone();
  }
  return copy;
}

template <class Derived>
void AdaptedModule<Derived>::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  torch::nn::Module::to(device, dtype, non_blocking);
  if (merged()) base_.set_data(base_.to(device, dtype, non_blocking));
}

template <class Derived>
void AdaptedModule<Derived>::to(torch::Dtype dtype, bool non_blocking) {
  torch::nn::Module::to(dtype, non_blocking);
  if (merged()) base_.set_data(base_.to(dtype, non_blocking));
}

template <class Derived>
void AdaptedModule<Derived>::to(torch::Device device, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
  if (merged()) base_.set_data(base_.to(device, non_blocking));
}

template <class Derived>
void AdaptedModule<Derived>::save(torch::serialize::OutputArchive& archive) const {
  check_unmerged("save");
  torch::nn::Module::save(archive);
}

template <class Derived>
void AdaptedModule<Derived>::load(torch::serialize::InputArchive& archive) {
  check_unmerged("load");
  torch::nn::Module::load(archive);
}

template <class Derived>
void AdaptedModule<Derived>::replace_weight(const at::Tensor& replacement) {
  weight = replacement;
  this->parameters_["weight"] = replacement;
}

// Linear layers

template <class Derived>
AdaptedLinear<Derived>::AdaptedLinear(const LoRALinearOptions& options, bool triplets) {
  this->weight = torch::empty({options.out_features(), options.in_features()});
  if (options.bias()) bias = torch::empty({options.out_features()});
  this->adapt(with_triplets(options.settings(), triplets));
  this->register_tensors();
  reset_parameters();
}

template <class Derived>
AdaptedLinear<Derived>::AdaptedLinear(const torch::nn::Linear& linear,
                                      const AdapterOptions& options, bool triplets)
    : bias(linear->bias) {
  this->weight = linear->weight;
  this->adapt(with_triplets(options.settings(), triplets));
  if (bias.defined()) bias.requires_grad_(false);
  this->register_tensors();
  this->train(linear->is_training());
  this->reset_adapter();
}

template <class Derived>
std::vector<std::pair<const char*, at::Tensor*>> AdaptedLinear<Derived>::tensors() {
  auto all = AdaptedModule<Derived>::tensors();
  all.insert(all.begin() + 1, {"bias", &bias});
  return all;
}

template <class Derived>
void AdaptedLinear<Derived>::reset_parameters() {
  this->check_unmerged("reset_parameters");
  torch::nn::init::kaiming_uniform_(this->weight, std::sqrt(5.0));  // as torch::nn::Linear
  if (bias.defined()) {
    const double bound = 1 / std::sqrt(static_cast<double>(this->weight.size(1)));
    torch::nn::init::uniform_(bias, -bound, bound);
  }
  this->reset_adapter();
}

template <class Derived>
at::Tensor AdaptedLinear<Derived>::forward(const at::Tensor& input) {
  this->check_trainable(this->is_training());
  if (this->merged()) return at::linear(input, this->weight, if_defined(bias));
  return lora_linear(input, this->weight, if_defined(bias), this->lora_A, this->lora_B,
                     if_defined(this->lora_E), this->scaling(),
                     this->is_training() ? this->settings().dropout : 0.0, this->rank());
}

template <class Derived>
void AdaptedLinear<Derived>::pretty_print(std::ostream& stream) const {
  stream << "rankwise::nn::" << (this->settings().triplets ? "AdaLoRALinear" : "LoRALinear")
         << std::boolalpha << "(in_features=" << this->weight.size(1)
         << ", out_features=" << this->weight.size(0) << ", bias=" << bias.defined() << ", ";
  this->print_adapter(stream);
  stream << ")";
}

// Embeddings

LoRAEmbeddingImpl::LoRAEmbeddingImpl(const LoRAEmbeddingOptions& options)
    : padding_idx_(padding_of(options.padding_idx(), options.num_embeddings())) {
  weight = torch::empty({options.num_embeddings(), options.embedding_dim()});
  adapt(without_dropout(options.settings()));
  register_tensors();
  reset_parameters();
}

LoRAEmbeddingImpl::LoRAEmbeddingImpl(const torch::nn::Embedding& embedding,
                                     const AdapterOptions& options)
    : padding_idx_(padding_of(embedding->options.padding_idx(), embedding->weight.size(0))) {
  const torch::nn::EmbeddingOptions& base = embedding->options;
  if (base.max_norm() || base.scale_grad_by_freq() || base.sparse())
    throw std::invalid_argument(
        "LoRAEmbedding: an embedding with max_norm, scale_grad_by_freq or sparse is not supported");
  weight = embedding->weight;
  adapt(without_dropout(options.settings()));
  register_tensors();
  train(embedding->is_training());
  reset_adapter();
}

void LoRAEmbeddingImpl::reset_parameters() {
  check_unmerged("reset_parameters");
  const torch::NoGradGuard no_grad;
  weight.normal_();
  if (padding_idx_ >= 0) weight.select(0, padding_idx_).zero_();
  reset_adapter();
}

void LoRAEmbeddingImpl::initialise(const at::Tensor& A, const at::Tensor& B) const {
  if (settings().init.value_or(LoRAInit::swapped) == LoRAInit::swapped) {
    B.normal_();  // as the paper's code: unit variance
  } else {
    Adapted::initialise(A, B);
  }
}

at::Tensor LoRAEmbeddingImpl::forward(const at::Tensor& indices) {
  check_trainable(is_training());
  if (merged()) return at::embedding(weight, indices, padding_idx_);
  return lora_embedding(indices, weight, lora_A, lora_B, {}, scaling(), padding_idx_, rank());
}

void LoRAEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "rankwise::nn::LoRAEmbedding(num_embeddings=" << weight.size(0)
         << ", embedding_dim=" << weight.size(1) << ", ";
  if (padding_idx_ >= 0) stream << "padding_idx=" << padding_idx_ << ", ";
  print_adapter(stream);
  stream << ")";
}

template class AdaptedModule<LoRALinearImpl>;
template class AdaptedModule<AdaLoRALinearImpl>;
template class AdaptedModule<LoRAEmbeddingImpl>;
template class AdaptedLinear<LoRALinearImpl>;
template class AdaptedLinear<AdaLoRALinearImpl>;

}  // namespace rankwise::nn
