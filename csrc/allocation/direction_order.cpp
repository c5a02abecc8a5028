// Moving an adapter's kept directions to the front, in place.
#include "direction_order.h"

#include <ATen/ATen.h>
#include <rankwise/tensor_memory.h>

#include <algorithm>
#include <array>

namespace rankwise {
namespace {

constexpr std::array<int64_t, 3> directions_of = {0, 1, 0};  // the dimension of A's, B's and E's

std::optional<std::vector<at::Tensor>> state_of(const at::Tensor& parameter,
                                                const OptimizerView& optimizer) {
  if (!optimizer.state_of) return std::vector<at::Tensor>();
  return optimizer.state_of(parameter);
}

void keep(const at::Tensor& tensor, int64_t dim, int64_t rank, const at::Tensor& kept) {
  const at::Tensor first = tensor.index_select(dim, kept.to(tensor.device()));
  tensor.narrow(dim, 0, first.size(dim)).copy_(first);
  tensor.narrow(dim, first.size(dim), rank - first.size(dim)).zero_();
}

}  // namespace

bool can_move(const Adapter& adapter, const OptimizerView& optimizer) {
  for (const at::Tensor& factor : adapter.factors()) {
    const auto states = state_of(factor, optimizer);
    const auto fits = [&](const at::Tensor& state) { return state.sizes() == factor.sizes(); };
    if (!states || !std::ranges::all_of(*states, fits)) return false;
  }
  return true;
}

void order_directions(const Adapter& adapter, const std::vector<int64_t>& before,
                      const std::vector<int64_t>& after) {
  std::vector<int64_t> rows;
  for (const int64_t direction : after)
    rows.push_back(std::find(before.begin(), before.end(), direction) - before.begin());
  const at::Tensor index = at::tensor(rows, at::kLong);
  const std::array<at::Tensor, 3> factors = adapter.factors();
  for (size_t f = 0; f < factors.size(); ++f)
    factors[f].copy_(factors[f].index_select(directions_of[f], index.to(factors[f].device())));
}

bool zero_behind(const Adapter& adapter, int64_t rank) {
  const std::array<at::Tensor, 3> factors = adapter.factors();
  for (size_t f = 0; f < factors.size(); ++f) {
    const int64_t dim = directions_of[f], rest = factors[f].size(dim) - rank;
    if (factors[f].narrow(dim, rank, rest).any().item<bool>()) return false;
  }
  return true;
}

void keep_directions(const Adapter& adapter, const at::Tensor& kept,
                     const OptimizerView& optimizer) {
  const std::array<at::Tensor, 3> factors = adapter.factors();
  for (size_t f = 0; f < factors.size(); ++f) {
    const at::Tensor& factor = factors[f];
    const int64_t dim = directions_of[f];
    keep(factor, dim, adapter.rank, kept);
    if (factor.grad().defined()) {
      if (has_overlap(factor.grad())) factor.mutable_grad() = factor.grad().clone();
      keep(factor.grad(), dim, adapter.rank, kept);
    }
    const std::vector<at::Tensor> states = state_of(factor, optimizer).value();
    for (const at::Tensor& state : states) keep(state, dim, adapter.rank, kept);
  }
}

}  // namespace rankwise
