// lora_embedding from ATen ops: y[i] = W0[i] + scaling * (A^T[i] * E^T) B^T.
#include "lora_embedding_composite.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "checks.h"
#include "matrices.h"

namespace rankwise {
namespace {

// The active directions: A^T [num, rank], B [dim, rank], E^T [1, rank].
struct Factors {
  at::Tensor At, B, Et;

  Factors(const at::Tensor& lora_A, const at::Tensor& lora_B,
          const std::optional<at::Tensor>& lora_E, const c10::SymInt& rank)
      : At(lora_A.narrow_symint(0, 0, rank).t()),
        B(lora_B.narrow_symint(1, 0, rank)),
        Et(has(lora_E) ? lora_E->narrow_symint(0, 0, rank).t() : at::Tensor()) {}

  at::Tensor gated(const at::Tensor& hidden) const { return Et.defined() ? hidden * Et : hidden; }
};

}  // namespace

EmbeddingForwardResult lora_embedding_forward_composite(
    const at::Tensor& indices, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E, double scaling,
    int64_t padding_idx, c10::SymInt rank) {
  check_lora_embedding("lora_embedding", indices, weight, lora_A, lora_B, lora_E, scaling, rank);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Factors f(lora_A, lora_B, lora_E, rank);
  const at::Tensor flat = indices.reshape_symint({indices.sym_numel()});
  const at::Tensor hidden = at::embedding(f.At, flat, padding_idx);
  const at::Tensor update = at::linear(f.gated(hidden), f.B) * scaling;
  const at::Tensor output = at::embedding(weight, flat, padding_idx) + update;
  auto shape = indices.sym_sizes().vec();
  shape.push_back(weight.sym_size(1));
  return {output.to(weight.scalar_type()).reshape_symint(shape), hidden};
}

EmbeddingBackwardResult lora_embedding_backward_composite(
    const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
    const at::Tensor& lora_A, const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
    const at::Tensor& hidden, double scaling, int64_t padding_idx, c10::SymInt rank,
    std::array<bool, 4> output_mask) {
  check_lora_embedding("lora_embedding", indices, weight, lora_A, lora_B, lora_E, scaling, rank);
  check_embedding_backward("lora_embedding", grad_output, indices, weight, lora_A, hidden, rank);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::SymInt tokens = indices.sym_numel(), capacity = lora_A.sym_size(0);
  const Factors f(lora_A, lora_B, lora_E, rank);
  const at::Tensor flat = indices.reshape_symint({tokens});
  const at::Tensor dy = grad_output.reshape_symint({tokens, weight.sym_size(1)});
  const at::Tensor dy_adapter = dy.to(lora_A.scalar_type());
  const at::Tensor dh_raw = dy_adapter.matmul(f.B) * scaling;
  const auto to_table = [&](const at::Tensor& rows) {
    // ATen's CUDA kernel reads out of bounds for rows of width 0. All their sums are alike.
    if (TORCH_GUARD_OR_FALSE(rows.sym_size(1).sym_eq(0))) {
      return rows.sum(0, /*keepdim=*/true).expand_symint({weight.sym_size(0), 0});
    }
    return at::embedding_dense_backward_symint(rows, flat, weight.sym_size(0), padding_idx,
                                               /*scale_grad_by_freq=*/false);
  };

  at::Tensor dw, da, dB, de;
  if (output_mask[0]) dw = to_table(dy);
  if (output_mask[1]) da = padded(to_table(f.gated(dh_raw)).t().contiguous(), 0, capacity);
  if (output_mask[2] || output_mask[3]) {
    const at::Tensor h = at::embedding(f.At, flat, padding_idx);
    if (output_mask[2]) dB = padded(dy_adapter.t().matmul(f.gated(h)) * scaling, 1, capacity);
    if (output_mask[3]) de = padded((dh_raw * h).sum(0).unsqueeze(1), 0, capacity);
  }
  return {dw, da, dB, de};
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("_lora_embedding_forward", &rankwise::lora_embedding_forward_composite);
  m.impl("_lora_embedding_backward", &rankwise::lora_embedding_backward_composite);
}
