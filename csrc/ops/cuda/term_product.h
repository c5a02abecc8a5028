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

// Whether product_with_term serves left [rows, depth] right [depth, cols] and the adapter's term;
// `masked`, with dropout of that.
bool joins_term(const CudaAdapter& adapter, const at::Tensor& left, const at::Tensor& right,
                bool masked = false);

// left right + mask(term_left term_right) + bias, [rows, cols]: sums in float32, rounded once, on
// the current stream. term_left [rows, rank], term_right [rank, cols], bias [cols], all of one
// dtype; for left of bfloat16 the term may be of float32 (kernels/hopper/split_term.h). The same
// shapes and strides give the same bits.
at::Tensor product_with_term(const at::Tensor& left, const at::Tensor& right,
                             const at::Tensor& term_left, const at::Tensor& term_right,
                             const std::optional<at::Tensor>& bias,
                             const kernels::DropoutMask& mask = {});

}  // namespace rankwise
