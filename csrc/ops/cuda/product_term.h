// A LoRA term on its way into the sums of a layer's large product.
#pragma once

#include <ATen/core/Tensor.h>

#include "../../kernels/lora_linear.h"

namespace rankwise {

// Both matrices as the product reads them, rows at multiples of 16 bytes: factors of 16 bits as
// they are, float32 in parts of bfloat16 (kernels/split_term.h).
struct ProductTerm {
  at::Tensor left;      // [rows, directions]; to be written by the pass that has its values
  at::Tensor right;     // [directions, cols] or, not by row, [cols, directions]
  bool by_row = false;  // as the product's own right matrix
  kernels::SplitMatrix right_parts = {};  // of float32: `right` is to be written with `left`

  int beside = 0;  // multiprocessors that do passes beside the product (product_rule.h)
  // For dA beside the product, of float32: [rows, cut_rows], to be written with `left`.
  at::Tensor dh_parts = {};

  bool defined() const { return left.defined(); }
  bool split() const { return right_parts.rows > 0; }

  kernels::TermLeft to_write() const {
    if (!defined()) return {};
    return {left.mutable_data_ptr(), left.stride(0), split()};
  }
};

}  // namespace rankwise
