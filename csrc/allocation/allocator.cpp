// Allocator: the adapters that it changes, who is in charge of them, and their gradients.
#include <ATen/ATen.h>
#include <rankwise/allocator.h>

#include <algorithm>
#include <array>
#include <sstream>
#include <stdexcept>

#include "memory_check.h"

namespace rankwise {
namespace {

void check_adapter(const std::string& owner, const Adapter& adapter, bool triplets) {
  const auto fail = [&](const std::string& message) {
    throw std::invalid_argument(owner + ": " + message);
  };
  const auto& [name, A, B, E, rank, set_rank, rank_now, directions, scaling, probes] = adapter;
  check_memory(owner, adapter, /*gradients=*/false);
  const auto shape = [](const at::Tensor& tensor) {
    std::ostringstream text;
    if (tensor.defined()) {
      text << tensor.sizes();
    } else {
      text << "none";
    }
    return text.str();
  };
  const bool pair =
      A.defined() && B.defined() && A.dim() == 2 && B.dim() == 2 && B.size(1) == A.size(0);
  if (triplets) {
    const bool fits =
        pair && E.defined() && E.dim() == 2 && E.size(0) == A.size(0) && E.size(1) == 1;
    if (!fits)
      fail("'" + name +
           "' must have lora_A [capacity, in], lora_B [out, capacity] and lora_E "
           "[capacity, 1], got " +
           shape(A) + ", " + shape(B) + " and " + shape(E));
  } else if (!pair || E.defined()) {
    fail("'" + name + "' must have lora_A [capacity, in], lora_B [out, capacity] and no lora_E, " +
         "got " + shape(A) + ", " + shape(B) + " and " + shape(E));
  }
  for (const at::Tensor& factor : adapter.factors())
    if (factor.defined() && !factor.is_contiguous())
      fail("the factors of '" + name + "' must be contiguous");
  if (directions && directions->capacity() != A.size(0)) {
    fail("the directions of '" + name + "' must be as many as its capacity " +
         std::to_string(A.size(0)) + ", got " + std::to_string(directions->capacity()));
  }
  if (rank < 0 || rank > A.size(0)) {
    fail("the rank of '" + name + "' must be from 0 to its capacity " + std::to_string(A.size(0)) +
         ", got " + std::to_string(rank));
  }
}

void add_name(std::string& list, const std::string& name) {
  list += (list.empty() ? "'" : ", '") + name + "'";
}

}  // namespace

Allocator::Allocator(std::string owner, std::string entry, std::vector<Adapter> adapters,
                     bool triplets)
    : owner_(std::move(owner)), entry_(std::move(entry)), adapters_(std::move(adapters)) {
  if (adapters_.empty())
    throw std::invalid_argument(owner_ + ": there must be at least one adapter");
  std::set<std::string> names;
  for (const Adapter& adapter : adapters_) {
    check_adapter(owner_, adapter, triplets);
    if (!names.insert(adapter.name).second)
      throw std::invalid_argument(owner_ + ": two adapters are called '" + adapter.name + "'");
    for (const at::Tensor& factor : adapter.factors()) factors_.push_back(factor);
  }
}

void Allocator::step(const OptimizerView& optimizer) {
  in_group(meets_now(), [&] { take_step(optimizer); });
  call_back();
}

void Allocator::on_step(std::function<void(const Allocator&)> callback) {
  callbacks_.push_back(std::move(callback));
}

void Allocator::call_back() const {
  for (const auto& callback : callbacks_) callback(*this);
}

void Allocator::take_charge(bool moves) {
  for (const Adapter& adapter : adapters_) {
    const auto other = adapter.directions ? adapter.directions->allocator.lock() : nullptr;
    if (!other || !*other) continue;
    throw std::invalid_argument(
        owner_ + ": '" + adapter.name +
        "' has an allocator already, which has made steps, and two would prune it twice. Go on "
        "with "
        "that one; or call its detach(), for a new schedule over the directions that are left");
  }
  for (const Adapter& adapter : adapters_) {
    if (adapter.directions) {
      adapter.directions->allocator = stepped_;
      adapter.directions->movable |= moves;
    }
    orders_.push_back(adapter.directions ? adapter.directions->order() : std::vector<int64_t>());
  }
  initial_orders_ = orders_;
}

bool Allocator::in_charge() const {
  return std::ranges::all_of(adapters_, [&](const Adapter& adapter) {
    return !adapter.directions || adapter.directions->allocator.lock() == stepped_;
  });
}

void Allocator::detach() {
  for (const Adapter& adapter : adapters_)
    if (adapter.directions && adapter.directions->allocator.lock() == stepped_)
      adapter.directions->allocator.reset();
}

void Allocator::check_adapters() const {
  TORCH_CHECK(in_charge(), owner_,
              ": it is no longer in charge: detach() was called, or another allocator "
              "was made for the same adapters; go on with that one");
  for (size_t m = 0; m < adapters_.size(); ++m) check_order(m);
}

void Allocator::check_order(size_t m) const {
  const Adapter& adapter = adapters_[m];
  if (!adapter.directions) return;
  const int64_t rank = adapter.rank_now ? adapter.rank_now() : adapter.rank;
  if (rank < 0) return;
  TORCH_CHECK(rank == adapter.rank + adapter.probes && adapter.directions->order() == orders_[m],
              owner_, ": '", adapter.name, "' has rank ", rank,
              " and another order of directions than this allocator left it with, rank ",
              adapter.rank,
              ": a state of another step was loaded into the model. Load the allocator's state of "
              "that step too, and the optimizer's (load_state_dict; torch::load in C++), or make "
              "the allocator after loading");
}

void Allocator::check_all_memory() const {
  for (const Adapter& adapter : adapters_) check_memory(owner_, adapter, /*gradients=*/true);
}

void Allocator::replace_factors(const std::string& name, const at::Tensor& A, const at::Tensor& B,
                                const at::Tensor& E) {
  const auto found = std::ranges::find(adapters_, name, &Adapter::name);
  if (found == adapters_.end())
    throw std::invalid_argument(owner_ + ": it has no adapter '" + name + "'");
  const std::array<at::Tensor, 3> before = found->factors(), now = {A, B, E};
  for (size_t f = 0; f < now.size(); ++f) {
    const bool fits =
        before[f].defined()
            ? now[f].defined() && now[f].sizes() == before[f].sizes() && now[f].is_contiguous()
            : !now[f].defined();
    if (fits) continue;
    throw std::invalid_argument(
        owner_ + ": the factors of '" + name +
        "' were replaced by others that are not contiguous or have other shapes; make a new "
        "allocator");
  }
  found->lora_A = A;
  found->lora_B = B;
  found->lora_E = E;
  std::ranges::copy(now, factors_.begin() + 3 * (found - adapters_.begin()));
  looked_at_optimizer_ = false;
}

void Allocator::warn_of_untrained(const OptimizerView& optimizer) {
  if (looked_at_optimizer_ || !optimizer.holds) return;
  looked_at_optimizer_ = true;
  std::string untrained;
  constexpr std::array factor_names = {".lora_A", ".lora_B", ".lora_E"};
  for (size_t i = 0; i < factors_.size(); ++i) {
    if (factors_[i].defined() && factors_[i].requires_grad() && !optimizer.holds(factors_[i]))
      add_name(untrained, adapters_[i / 3].name + factor_names[i % 3]);
  }
  if (!untrained.empty()) {
    TORCH_WARN(owner_, ": the optimizer that it follows does not hold ", untrained,
               ": unless another one trains them, nobody does. Make the optimizer over the "
               "model's parameters as they are now, after the adapters");
  }
}

Allocator::Gradients Allocator::gather(int64_t step) {
  Gradients gradients;
  std::string missing;
  size_t present = 0;
  gradients.reserve(factors_.size());
  for (size_t m = 0; m < adapters_.size(); ++m) {
    bool lacks = false;
    for (size_t i = 3 * m; i < 3 * m + 3; ++i) {
      const at::Tensor gradient = factors_[i].defined() ? factors_[i].grad() : at::Tensor();
      lacks |= factors_[i].defined() && !gradient.defined();
      present += gradient.defined();
      gradients.push_back(gradient.defined() ? std::optional(gradient.contiguous()) : std::nullopt);
    }
    if (lacks && warned_.insert(adapters_[m].name).second) add_name(missing, adapters_[m].name);
  }
  TORCH_CHECK(present > 0, owner_,
              ": no adapter has a gradient. It must run after optimizer.step() and "
              "before zero_grad(): allocator.attach(optimizer) does that; after that, nothing may "
              "clear the gradients before the step ends");
  if (!missing.empty()) {
    TORCH_WARN(owner_, ": no gradient in step ", step, " for (a factor of) ", missing,
               ", whose scores stay as they are; a module that never takes part loses its "
               "directions to others");
  }
  return gradients;
}

std::vector<at::Tensor> Allocator::present(const Gradients& gradients) {
  std::vector<at::Tensor> result;
  for (const std::optional<at::Tensor> gradient : gradients)
    if (gradient) result.push_back(*gradient);
  return result;
}

std::vector<std::pair<int64_t, int64_t>> Allocator::sizes() const {
  std::vector<std::pair<int64_t, int64_t>> sizes;
  for (const Adapter& adapter : adapters_)
    sizes.emplace_back(adapter.lora_B.size(0), adapter.lora_A.size(1));
  return sizes;
}

std::vector<int64_t> Allocator::ranks_of_adapters() const {
  std::vector<int64_t> ranks;
  for (const Adapter& adapter : adapters_) ranks.push_back(adapter.rank);
  return ranks;
}

}  // namespace rankwise
