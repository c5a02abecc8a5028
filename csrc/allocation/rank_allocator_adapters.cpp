// RankAllocator and the layers of its adapters: in which order directions lie.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <rankwise/rank_allocator.h>

#include <algorithm>
#include <numeric>

#include "direction_order.h"

namespace rankwise {
namespace {

std::vector<int64_t> numbers(const at::Tensor& integers) {
  const auto* const first = integers.const_data_ptr<int64_t>();
  return {first, first + integers.numel()};
}

// `order` with the rows `kept` first, and the others behind them as they were.
std::vector<int64_t> moved_to_front(const std::vector<int64_t>& order,
                                    const std::vector<int64_t>& kept) {
  std::vector<int64_t> moved;
  for (const int64_t row : kept) moved.push_back(order[row]);
  std::vector<bool> taken(order.size(), false);
  for (const int64_t row : kept) taken[row] = true;
  for (size_t row = 0; row < order.size(); ++row)
    if (!taken[row]) moved.push_back(order[row]);
  return moved;
}

}  // namespace

// In the first step, that there may be another state to go on with.
void RankAllocator::warn_of_earlier_schedule() const {
  std::string left;
  for (size_t m = 0; m < adapters_.size() && !*stepped_; ++m) {
    const auto& directions = adapters_[m].directions;
    if (directions && initial_ranks_[m] < directions->first_rank())
      left += (left.empty() ? "'" : ", '") + adapters_[m].name + "'";
  }
  if (left.empty()) return;
  TORCH_WARN("RankAllocator: an earlier schedule pruned ", left,
             ", and this one prunes what is left; to go on with the earlier one, load its state "
             "first");
}

void RankAllocator::note_order(size_t m, const at::Tensor& kept) {
  if (!adapters_[m].directions) return;
  orders_[m] = moved_to_front(orders_[m], numbers(kept));
  adapters_[m].directions->set_order(orders_[m]);
}

// The initial ranks of a state's allocator: this one's, or all the directions that an earlier
// schedule began with.
std::vector<int64_t> RankAllocator::ranks_in(const std::map<std::string, at::Tensor>& state) const {
  std::vector<int64_t> first;
  for (const Adapter& adapter : adapters_) {
    const auto kept = state.find(adapter.name + ".kept");
    const bool of_first = adapter.directions && kept != state.end() && kept->second.defined() &&
                          kept->second.numel() == adapter.directions->first_rank();
    if (!of_first) return initial_ranks_;
    first.push_back(kept->second.numel());
  }
  return first;
}

// Becomes the allocator of the adapters as they were made, before an earlier schedule.
void RankAllocator::begin_with(const std::vector<int64_t>& first_ranks) {
  initial_ranks_ = first_ranks;
  schedule_ = schedule_from(first_ranks);
  for (std::vector<int64_t>& order : initial_orders_) std::iota(order.begin(), order.end(), 0);
}

// Puts an adapter's directions in the order of a state that keeps these, as its layer may have
// others: where it was shrunk since, or not yet. Factors whose state said nothing of an order are
// in it already when they have zeros behind the kept.
void RankAllocator::arrange(size_t m, const at::Tensor& kept) {
  const at::NoGradGuard no_grad;
  const Adapter& adapter = adapters_[m];
  if (!adapter.directions) return;
  orders_[m] = moved_to_front(initial_orders_[m], numbers(kept));
  const std::vector<int64_t> before = adapter.directions->order();
  if (before == orders_[m]) return;
  if (before != initial_orders_[m] || !zero_behind(adapter, kept.numel()))
    order_directions(adapter, before, orders_[m]);
  adapter.directions->set_order(orders_[m]);
}

}  // namespace rankwise
