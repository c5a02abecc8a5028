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

// The term that joins y = x w^T or dx = dy w, its left matrix to be written; undefined where the
// product does not serve them. `x`, where dA is asked for as well.
ProductTerm output_term(const CudaAdapter& adapter, const at::Tensor& x, const at::Tensor& w);
ProductTerm input_term(const CudaAdapter& adapter, const at::Tensor& dy, const at::Tensor& w,
                       const at::Tensor& x);

// Writes the term's left matrix, [rows, rank] of the adapter's type.
void write(const ProductTerm& term, const at::Tensor& left);

// left right + mask(term) + bias, [rows, cols]: sums in float32, rounded once, on the current
// stream. bias [cols], all of one dtype. The same shapes and strides give the same bits.
at::Tensor product_with_term(const at::Tensor& left, const at::Tensor& right,
                             const ProductTerm& term, const std::optional<at::Tensor>& bias,
                             const kernels::DropoutMask& mask = {});

// y = x w^T + term + bias and hidden = x A^T beside it, of which the term is made; for a term with
// multiprocessors beside it.
at::Tensor product_beside_shrink(const CudaAdapter& adapter, const at::Tensor& x,
                                 const at::Tensor& w, const ProductTerm& term,
                                 const std::optional<at::Tensor>& bias, const at::Tensor& hidden);

// dx = dy w + term, and slices of dA = dh^T x beside it.
struct InputProducts {
  at::Tensor dx;
  c10::DataPtr slices;
  int64_t count;
};
InputProducts product_beside_input_factor(const CudaAdapter& adapter, const at::Tensor& dy,
                                          const at::Tensor& w, const ProductTerm& term,
                                          const at::Tensor& x);

}  // namespace rankwise
