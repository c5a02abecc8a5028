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

  explicit Factors(const AdapterOperands& of)
      : At(of.lora_A.narrow_symint(0, 0, of.rank).t()),
        B(of.lora_B.narrow_symint(1, 0, of.rank)),
        Et(has(of.lora_E) ? of.lora_E->narrow_symint(0, 0, of.rank).t() : at::Tensor()) {}

  at::Tensor gated(const at::Tensor& hidden) const { return Et.defined() ? hidden * Et : hidden; }
};

}  // namespace

EmbeddingForwardResult lora_embedding_forward_composite(const at::Tensor& indices,
                                                        const at::Tensor& weight,
                                                        const AdapterOperands& operands,
                                                        int64_t padding_idx) {
  check_lora_embedding("lora_embedding", indices, weight, operands);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Factors f(operands);
  const at::Tensor flat = indices.reshape_symint({indices.sym_numel()});
  const at::Tensor hidden = at::embedding(f.At, flat, padding_idx);
  const at::Tensor update = at::linear(f.gated(hidden), f.B) * operands.scaling;
  const at::Tensor output = at::embedding(weight, flat, padding_idx) + update;
  auto shape = indices.sym_sizes().vec();
  shape.push_back(weight.sym_size(1));
  return {output.to(weight.scalar_type()).reshape_symint(shape), hidden};
}

EmbeddingBackwardResult lora_embedding_backward_composite(
    const at::Tensor& grad_output, const at::Tensor& indices, const at::Tensor& weight,
    const AdapterOperands& operands, const at::Tensor& hidden, int64_t padding_idx,
    std::array<bool, 4> output_mask) {
  check_lora_embedding("lora_embedding", indices, weight, operands);
  check_embedding_backward("lora_embedding", grad_output, indices, weight, operands, hidden);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::SymInt tokens = indices.sym_numel(), capacity = operands.lora_A.sym_size(0);
  const double scaling = operands.scaling;
  const Factors f(operands);
  const at::Tensor flat = indices.reshape_symint({tokens});
  const at::Tensor dy = grad_output.reshape_symint({tokens, weight.sym_size(1)});
  const at::Tensor dy_adapter = dy.to(f.B.scalar_type());
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
  m.impl("_lora_embedding_forward",
         &rankwise::embedding_forward<rankwise::lora_embedding_forward_composite>);
  m.impl("_lora_embedding_backward",
         &rankwise::embedding_backward<rankwise::lora_embedding_backward_composite>);
}
