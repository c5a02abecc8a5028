// The large product of a layer with the LoRA term in its sums (kernels/hopper), where the rule
// chooses it (product_rule.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "adapter.h"
#include "product_rule.h"

namespace rankwise {

// Whether the rule (product_rule.h) chooses it on a device, in a process that asked for it by
// RANKWISE_TERM_PRODUCT=on.
bool takes_term(c10::DeviceIndex device, const ProductSizes& sizes);

// The term that product_with_term adds to left [rows, depth] right [depth, cols], with
// `term_right` [rank, cols] of the adapter's type, and a left matrix to be written; undefined where
// it does not serve them. `masked`, with dropout of the term.
ProductTerm joined_term(const CudaAdapter& adapter, const at::Tensor& left, const at::Tensor& right,
                        const at::Tensor& term_right, bool masked = false);

// Writes the term's left matrix, [rows, rank] of the adapter's type.
void write(const ProductTerm& term, const at::Tensor& left);

// left right + mask(term) + bias, [rows, cols]: sums in float32, rounded once, on the current
// stream. bias [cols], all of one dtype. The same shapes and strides give the same bits.
at::Tensor product_with_term(const at::Tensor& left, const at::Tensor& right,
                             const ProductTerm& term, const std::optional<at::Tensor>& bias,
                             const kernels::DropoutMask& mask = {});

// The same for y = x w^T + term + bias with hidden = x A^T beside it, of which the term is made:
// both are written. Undefined, and nothing done, where the rule has it otherwise.
at::Tensor product_beside_shrink(const CudaAdapter& adapter, const at::Tensor& x,
                                 const at::Tensor& w, const ProductTerm& term,
                                 const std::optional<at::Tensor>& bias, const at::Tensor& hidden);

// The same for dx = dy w + term, and slices of dA = dh^T x beside it.
struct InputProducts {
  at::Tensor dx;  // undefined, and nothing done, where the rule has it otherwise
  c10::DataPtr slices;
  int64_t count = 0;
};
InputProducts product_beside_input_factor(const CudaAdapter& adapter, const at::Tensor& dy,
                                          const at::Tensor& w, const ProductTerm& term,
                                          const at::Tensor& x);

}  // namespace rankwise
