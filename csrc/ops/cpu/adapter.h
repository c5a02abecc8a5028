// A call's active factors and the dropout of its input, as the CPU's implementations take them.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <utility>
#include <vector>

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

// The adapters of layers that share their input, or one. All have one dtype and one dropout.
struct AdapterGroup {
  std::vector<ActiveAdapter> members;
  ActiveAdapter shared;  // the members' A above one another, and the dropout; its B and E are none

  explicit AdapterGroup(std::vector<ActiveAdapter> of)
      : members(std::move(of)), shared(members.front()) {
    shared.B = shared.E = at::Tensor();
    if (members.size() == 1) return;
    std::vector<at::Tensor> stacked;
    for (const ActiveAdapter& member : members) stacked.push_back(member.A);
    shared.A = at::cat(stacked);
  }

  size_t size() const { return members.size(); }
  // The first of a member's columns in `hidden` of all, [tokens, rank].
  int64_t offset(size_t member) const {
    int64_t result = 0;
    for (size_t i = 0; i < member; ++i) result += members[i].rank();
    return result;
  }
  // A member's columns of such a matrix.
  at::Tensor columns(const at::Tensor& of_all, size_t member) const {
    if (!of_all.defined() || size() == 1) return of_all;
    return of_all.narrow(1, offset(member), members[member].rank());
  }
};

// The active part's gradient inside a factor-shaped tensor whose other directions are zero; `dim`
// is that of the directions.
at::Tensor in_capacity(const at::Tensor& active, const at::Tensor& factor, int64_t dim);

}  // namespace rankwise
