// RankAllocator and the layers of its adapters: who is in charge, and in which order directions
// lie.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <rankwise/rank_allocator.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>

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

void RankAllocator::take_charge() {
  for (const auto& [name, A, B, E, rank, set_rank, rank_now, directions] : adapters_) {
    const auto other = directions ? directions->allocator.lock() : nullptr;
    if (!other || !*other) continue;
    throw std::invalid_argument(
        "RankAllocator: '" + name +
        "' has an allocator already, which has made steps, and two would prune it twice. Go on "
        "with "
        "that one; or call its detach(), for a new schedule over the directions that are left");
  }
  for (const Adapter& adapter : adapters_) {
    if (adapter.directions) {
      adapter.directions->allocator = stepped_;
      adapter.directions->movable |= options_.shrink();
    }
    orders_.push_back(adapter.directions ? adapter.directions->order() : std::vector<int64_t>());
  }
  initial_orders_ = orders_;
}

bool RankAllocator::in_charge() const {
  return std::ranges::all_of(adapters_, [&](const Adapter& adapter) {
    return !adapter.directions || adapter.directions->allocator.lock() == stepped_;
  });
}

void RankAllocator::detach() {
  for (const Adapter& adapter : adapters_)
    if (adapter.directions && adapter.directions->allocator.lock() == stepped_)
      adapter.directions->allocator.reset();
}

void RankAllocator::check_adapters() const {
  TORCH_CHECK(in_charge(),
              "RankAllocator: it is no longer in charge: detach() was called, or another allocator "
              "was made for the same adapters; go on with that one");
  for (size_t m = 0; m < adapters_.size(); ++m) check_order(m);
}

// Whether the layer is as this allocator left it.
void RankAllocator::check_order(size_t m) const {
  const Adapter& adapter = adapters_[m];
  if (!adapter.directions) return;
  const int64_t rank = adapter.rank_now ? adapter.rank_now() : adapter.rank;
  if (rank < 0) return;
  TORCH_CHECK(rank == adapter.rank && adapter.directions->order() == orders_[m], "RankAllocator: '",
              adapter.name, "' has rank ", rank,
              " and another order of directions than this allocator left it with, rank ",
              adapter.rank,
              ": a state of another step was loaded into the model. Load the allocator's state of "
              "that step too, and the optimizer's (load_state_dict; torch::load in C++), or make "
              "the allocator after loading");
}

void RankAllocator::replace_factors(const std::string& name, const at::Tensor& A,
                                    const at::Tensor& B, const at::Tensor& E) {
  const auto found = std::ranges::find(adapters_, name, &Adapter::name);
  if (found == adapters_.end())
    throw std::invalid_argument("RankAllocator: it has no adapter '" + name + "'");
  const std::array<at::Tensor, 3> before = found->factors(), now = {A, B, E};
  for (size_t f = 0; f < now.size(); ++f) {
    const bool fits =
        now[f].defined() && now[f].sizes() == before[f].sizes() && now[f].is_contiguous();
    if (fits) continue;
    throw std::invalid_argument(
        "RankAllocator: the factors of '" + name +
        "' were replaced by others that are not contiguous or have other shapes; make a new "
        "allocator");
  }
  found->lora_A = A;
  found->lora_B = B;
  found->lora_E = E;
  std::ranges::copy(now, factors_.begin() + 3 * (found - adapters_.begin()));
  looked_at_optimizer_ = false;
}

// In the first step, what may be meant otherwise.
void RankAllocator::warn_once(const OptimizerView& optimizer) {
  std::string left, untrained;
  const auto name_in = [](std::string& list, const std::string& name) {
    list += (list.empty() ? "'" : ", '") + name + "'";
  };
  for (size_t m = 0; m < adapters_.size() && !*stepped_; ++m) {
    const auto& directions = adapters_[m].directions;
    if (directions && initial_ranks_[m] < directions->first_rank())
      name_in(left, adapters_[m].name);
  }
  if (!left.empty()) {
    TORCH_WARN("RankAllocator: an earlier schedule pruned ", left,
               ", and this one prunes what is left; to go on with the earlier one, load its state "
               "first");
  }
  if (looked_at_optimizer_ || !optimizer.holds) return;
  looked_at_optimizer_ = true;
  constexpr std::array factor_names = {".lora_A", ".lora_B", ".lora_E"};
  for (size_t i = 0; i < factors_.size(); ++i) {
    if (factors_[i].requires_grad() && !optimizer.holds(factors_[i]))
      name_in(untrained, adapters_[i / 3].name + factor_names[i % 3]);
  }
  if (!untrained.empty()) {
    TORCH_WARN("RankAllocator: the optimizer that it follows does not hold ", untrained,
               ": unless another one trains them, nobody does. Make the optimizer over the "
               "model's parameters as they are now, after the adapters");
  }
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
