// LoRAEmbedding: construction, first values, forward.
#include <rankwise/nn.h>
#include <rankwise/ops.h>

#include <ostream>
#include <stdexcept>
#include <string>

namespace rankwise::nn {
namespace {

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

LoRAEmbeddingImpl::LoRAEmbeddingImpl(const LoRAEmbeddingOptions& options)
    : padding_idx_(padding_of(options.padding_idx(), options.num_embeddings())) {
  weight = torch::empty({options.num_embeddings(), options.embedding_dim()});
  adapt(options.settings(), /*triplets=*/false);
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
  adapt(options.settings(), /*triplets=*/false);
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

void LoRAEmbeddingImpl::initialise(const at::Tensor& A, const at::Tensor& B,
                                   const AdapterSettings& settings) const {
  if (settings.init.value_or(LoRAInit::swapped) == LoRAInit::swapped) {
    B.normal_();  // as the paper's code: unit variance
  } else {
    Adapted::initialise(A, B, settings);
  }
}

at::Tensor LoRAEmbeddingImpl::forward(const at::Tensor& indices) {
  check_trainable(is_training());
  if (merged() || !adapter()) return at::embedding(weight, indices, padding_idx_);
  return lora_embedding(indices, weight, lora_A, lora_B, {}, scaling(), padding_idx_, rank());
}

void LoRAEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "rankwise::nn::LoRAEmbedding(num_embeddings=" << weight.size(0)
         << ", embedding_dim=" << weight.size(1) << ", ";
  if (padding_idx_ >= 0) stream << "padding_idx=" << padding_idx_ << ", ";
  print_adapter(stream);
  stream << ")";
}

}  // namespace rankwise::nn
