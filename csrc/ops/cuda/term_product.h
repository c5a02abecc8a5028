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

}  // namespace rankwise
