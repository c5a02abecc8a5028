// Directions: the order of an adapter's directions, also as a tensor of a state.
#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <rankwise/directions.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

namespace rankwise {
namespace {

uint64_t random_number() {
  std::random_device source;
  return uint64_t{source()} << 32 | source();
}

// Whether the first `count` are different directions of so many.
bool distinct(const std::vector<int64_t>& order, int64_t count) {
  std::vector<bool> seen(order.size(), false);
  for (int64_t i = 0; i < count; ++i) {
    const auto direction = static_cast<size_t>(order[i]);
    if (order[i] < 0 || direction >= order.size() || seen[direction]) return false;
    seen[direction] = true;
  }
  return true;
}

}  // namespace

Directions::Directions(int64_t capacity, int64_t first_rank)
    : origin_(random_number()), first_rank_(first_rank), order_(capacity) {
  std::iota(order_.begin(), order_.end(), 0);
}

Directions::Directions(std::vector<int64_t> order, int64_t first_rank, uint64_t origin,
                       bool movable)
    : movable(movable), origin_(origin), first_rank_(first_rank), order_(order.size()) {
  set_order(std::move(order));
}

void Directions::set_order(std::vector<int64_t> order) {
  if (order.size() != order_.size() || !distinct(order, capacity())) {
    throw std::invalid_argument(c10::str("directions: the order must have each of ", capacity(),
                                         " directions once, got ", at::IntArrayRef(order)));
  }
  order_ = std::move(order);
  movable |= !std::ranges::is_sorted(order_);
}

at::Tensor Directions::state(int64_t rank) const {
  at::Tensor state = at::full({capacity()}, -1, at::kFloat);
  std::copy_n(order_.begin(), rank, state.mutable_data_ptr<float>());
  return state;
}

std::pair<std::vector<int64_t>, int64_t> Directions::read(const at::Tensor& state) const {
  const at::Tensor numbers = state.detach().to(at::kCPU, at::kDouble).contiguous();
  const at::Tensor whole = numbers.to(at::kLong);
  const auto* const first = whole.const_data_ptr<int64_t>();
  std::vector<int64_t> order(first, first + whole.numel());
  const auto rank = std::find(order.begin(), order.end(), -1) - order.begin();
  const bool ends = std::all_of(order.begin() + rank, order.end(), [](auto i) { return i == -1; });
  if (numbers.dim() != 1 || numbers.numel() != capacity() || !ends || !distinct(order, rank) ||
      !whole.to(at::kDouble).equal(numbers)) {
    throw std::invalid_argument(c10::str(
        "directions must be different numbers from 0 to ", capacity() - 1,
        ", and -1 behind them, "
        "got ",
        at::IntArrayRef(order), " of shape ", numbers.sizes(),
        ". Is it an average of states from before and after a RankAllocator moved directions? "
        "Average states from after the freeze, or train with shrink=False, which moves none"));
  }
  order.resize(rank);
  for (int64_t i = 0; i < capacity(); ++i)
    if (std::find(order.begin(), order.begin() + rank, i) == order.begin() + rank)
      order.push_back(i);
  return {std::move(order), rank};
}

}  // namespace rankwise
