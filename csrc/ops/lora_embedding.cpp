// lora_embedding: y[i] = W0[i] + scaling * (A^T[i] * E^T) B^T, from differentiable ATen ops.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <rankwise/ops.h>
#include <torch/library.h>

#include "checks.h"

namespace rankwise {
namespace {

at::Tensor lora_embedding_composite(const at::Tensor& indices, const at::Tensor& weight,
                                    const at::Tensor& lora_A, const at::Tensor& lora_B,
                                    const std::optional<at::Tensor>& lora_E, double scaling,
                                    int64_t padding_idx, std::optional<c10::SymInt> rank) {
  constexpr auto op = "lora_embedding";
  TORCH_CHECK(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt, op,
              ": indices must be int64 or int32, got ", indices.scalar_type());
  TORCH_CHECK(weight.dim() == 2, op, ": weight must be [num_embeddings, embedding_dim], got ",
              weight.sym_sizes());
  const c10::SymInt active = active_rank(op, lora_A, weight.sym_size(0), rank);
  check_factors(op, weight, weight.sym_size(0), weight.sym_size(1), lora_A, lora_B, lora_E, scaling,
                active);
  const at::Tensor base = at::embedding(weight, indices, padding_idx);
  at::Tensor hidden = at::embedding(lora_A.narrow_symint(0, 0, active).t(), indices, padding_idx);
  if (has(lora_E)) hidden = hidden * lora_E->narrow_symint(0, 0, active).select(1, 0);
  const at::Tensor update = at::linear(hidden, lora_B.narrow_symint(1, 0, active)) * scaling;
  return (base + update).to(weight.scalar_type());
}

}  // namespace

at::Tensor lora_embedding(const at::Tensor& indices, const at::Tensor& weight,
                          const at::Tensor& lora_A, const at::Tensor& lora_B,
                          const std::optional<at::Tensor>& lora_E, double scaling,
                          int64_t padding_idx, std::optional<int64_t> rank) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rankwise::lora_embedding", "")
                             .typed<decltype(lora_embedding_composite)>();
  std::optional<c10::SymInt> symbolic_rank;
  if (rank) symbolic_rank = *rank;
  return op.call(indices, weight, lora_A, lora_B, lora_E, scaling, padding_idx, symbolic_rank);
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeImplicitAutograd, m) {
  m.impl("lora_embedding", &rankwise::lora_embedding_composite);
}
