// Fuzzes states of both allocators: a state is refused and nothing is changed, or it is told again
// as it was, and the steps that follow stay within the adapters.
#include <ATen/ATen.h>
#include <rankwise/rank_allocator.h>
#include <rankwise/spectral_allocator.h>

#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

namespace {

using namespace rankwise;
using State = std::map<std::string, at::Tensor>;

constexpr int64_t capacity = 4, in = 5, out = 6;

/// Not random, not zero, with a gradient.
at::Tensor factor(int64_t rows, int64_t cols) {
  const at::Tensor values = (at::arange(rows * cols, at::kDouble) + 1).sin().reshape({rows, cols});
  const at::Tensor parameter = values.clone().requires_grad_();
  parameter.mutable_grad() = values.cos();
  return parameter;
}

std::vector<Adapter> adapters(bool triplets) {
  std::vector<Adapter> result;
  for (const char* name : {"a", "b.c"}) {
    const int64_t rank = triplets ? capacity : 2;
    result.push_back({name, factor(capacity, in), factor(out, capacity),
                      triplets ? factor(capacity, 1) : at::Tensor(), rank});
  }
  return result;
}

std::unique_ptr<Allocator> made(bool triplets) {
  if (triplets)
    return std::make_unique<RankAllocator>(
        adapters(true),
        AdaLoRAOptions().initial_rank(capacity).target_rank(2).total_steps(9).final_steps(3));
  return std::make_unique<SpectralAllocator>(adapters(false), SpectralOptions()
                                                                  .total_steps(9)
                                                                  .final_steps(3)
                                                                  .allocation_interval(2)
                                                                  .initial_budget(60)
                                                                  .final_budget(40)
                                                                  .min_age(1)
                                                                  .ramp_steps(2)
                                                                  .probes(1));
}

State state_after(bool triplets, int64_t steps) {
  const auto allocator = made(triplets);
  for (int64_t i = 0; i < steps; ++i) allocator->step();
  return allocator->state();
}

/// The states that are edited: before anything, in the middle, and at the end.
const State& state_number(size_t number) {
  static const std::vector<State> states = [] {
    std::vector<State> result;
    for (const bool triplets : {true, false})
      for (const int64_t steps : {0, 4, 5, 8}) result.push_back(state_after(triplets, steps));
    return result;
  }();
  return states.at(number);
}

bool same(const State& a, const State& b) {
  const auto equal = [](const State::value_type& left, const State::value_type& right) {
    const at::Tensor x = left.second.contiguous(), y = right.second.contiguous();
    return left.first == right.first && x.scalar_type() == y.scalar_type() &&
           x.sizes() == y.sizes() &&
           (x.nbytes() == 0 ||
            std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0);
  };
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), equal);
}

void set_element(at::Tensor& tensor, size_t place, uint64_t bits) {
  if (tensor.numel() == 0) return;
  tensor = tensor.contiguous().clone();
  const size_t i = place % static_cast<size_t>(tensor.numel()), size = tensor.element_size();
  if (tensor.scalar_type() == at::kBool) bits %= 2;
  std::memcpy(static_cast<char*>(tensor.mutable_data_ptr()) + i * size, &bits, size);
}

/// What 12 bytes say: which entry, what of it, where, and a number.
void edit(State& state, std::span<const uint8_t, 12> bytes) {
  if (state.empty()) return;
  const auto entry = std::next(state.begin(), bytes[0] % state.size());
  at::Tensor& tensor = entry->second;
  uint64_t number = 0;
  std::memcpy(&number, &bytes[4], sizeof number);
  const auto size = static_cast<int64_t>(number % 8);
  switch (bytes[1] % 6) {
    case 0:
      return set_element(tensor, bytes[2] + 256 * bytes[3], number);
    case 1:
      if (tensor.dim() > 0) tensor = tensor.narrow(0, 0, std::min(size, tensor.size(0)));
      return;
    case 2:
      if (tensor.dim() > 0) tensor = at::cat({tensor, tensor}, bytes[2] % tensor.dim());
      return;
    case 3:
      tensor = tensor.to(bytes[2] % 2 == 0 ? at::kFloat : at::kLong);
      return;
    case 4:
      tensor = tensor.unsqueeze(0);
      return;
    default:
      state.erase(entry);
  }
}

void check_steps(Allocator& allocator) {
  for (int64_t i = 0; i < 4; ++i) {
    try {
      allocator.step();
    } catch (const c10::Error&) {
    } catch (const std::invalid_argument&) {
    }
    for (const auto& [name, rank] : allocator.ranks())
      check(rank >= 0 && rank <= capacity, "ranks are within the adapters");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0 || size > 100) return 0;
  const size_t number = data[0] % 8;
  State state = state_number(number);
  for (size_t at = 1; at + 12 <= size; at += 12)
    edit(state, std::span<const uint8_t, 12>(data + at, 12));
  const auto allocator = made(number < 4);
  const State before = allocator->state();
  try {
    allocator->load_state(state);
  } catch (const std::invalid_argument&) {
    check(same(allocator->state(), before), "a state that is refused changes nothing");
    return 0;
  }
  check(same(allocator->state(), state), "what is loaded is told again");
  check_steps(*allocator);
  return 0;
}
