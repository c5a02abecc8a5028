// A call's active factors and the dropout of its input, as the CPU's implementations take them.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "../checks.h"
#include "../dispatch.h"
#include "../dropout.h"
#include "blocks.h"
#include "dropout.h"

namespace rankwise {

struct ActiveAdapter {
  at::Tensor A, B, E;  // [rank, in], [out, rank], [rank, 1] or undefined
  double scaling;
  Dropout dropout;
  int64_t seed;

  ActiveAdapter(const AdapterOperands& of, const at::Tensor& seed_tensor)
      : A(leading(of.lora_A, 0, of.active())),
        B(leading(of.lora_B, 1, of.active())),
        E(has(of.lora_E) ? leading(*of.lora_E, 0, of.active()) : at::Tensor()),
        scaling(of.scaling),
        dropout(of.dropout_p),
        seed(dropout.active() ? *seed_tensor.const_data_ptr<int64_t>() : 0) {}

  at::ScalarType dtype() const { return A.scalar_type(); }
  int64_t rank() const { return A.size(0); }

  // The block in the adapter's dtype: a view where it is that already.
  at::Tensor cast(const at::Tensor& block) const { return block.to(dtype()); }

  // The block of x with dropped elements zero, unscaled.
  at::Tensor dropped(const at::Tensor& x, const Tile& tile) const {
    const at::Tensor block = tile.of(x);
    if (!dropout.active()) return cast(block);
    const at::Tensor masked = at::empty(block.sizes(), block.options().dtype(dtype()));
    dropout_copy(block, masked, {tile.row.start, tile.col.start, x.size(1)}, seed,
                 dropout.threshold());
    return masked;
  }

  static at::Tensor leading(const at::Tensor& factor, int64_t dim, int64_t rank) {
    return factor.size(dim) == rank ? factor : factor.narrow(dim, 0, rank);
  }

  double keep_scale() const { return dropout.active() ? dropout.keep_scale() : 1.0; }
};

// The active part's gradient inside a factor-shaped tensor whose other directions are zero; `dim`
// is that of the directions.
at::Tensor in_capacity(const at::Tensor& active, const at::Tensor& factor, int64_t dim);

}  // namespace rankwise
