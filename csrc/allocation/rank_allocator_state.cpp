// RankAllocator's state as named tensors: what a checkpoint holds.
//
//   options.<name>       0-d, compared on loading
//   steps, skipped_steps, frozen, shrunk                      0-d int64
//   <adapter>.kept       bool [initial rank]
//   <adapter>.lora_{A,B,E}.{sensitivity,uncertainty}          until the pattern is frozen
//   history.steps, .budgets [n], .ranks [n, adapters], .scores [n, 4]
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <rankwise/rank_allocator.h>
#include <rankwise/tensor_memory.h>

#include <array>

#include "../ops/importance.h"
#include "state_check.h"

namespace rankwise {
namespace {

using State = std::map<std::string, at::Tensor>;
constexpr std::array factor_names = {"lora_A", "lora_B", "lora_E"};

State options_of(const AdaLoRAOptions& o, const BudgetSchedule& schedule) {
  return {{"options.initial_budget", number(schedule.initial_budget())},
          {"options.final_budget", number(schedule.final_budget())},
          {"options.total_steps", number(o.total_steps())},
          {"options.warmup_steps", number(o.warmup_steps())},
          {"options.final_steps", number(o.final_steps())},
          {"options.allocation_interval", number(o.allocation_interval())},
          {"options.beta1", number(o.beta1())},
          {"options.beta2", number(o.beta2())},
          {"options.min_rank", number(o.min_rank())},
          {"options.shrink", number(int64_t{o.shrink()})}};
}

State history_state(const at::Tensor& choices, const at::Tensor& summaries) {
  const auto columns = [&](int64_t first, int64_t count) {
    return choices.narrow(1, first, count).clone(at::MemoryFormat::Contiguous);
  };
  return {{"history.steps", columns(0, 1).squeeze(1)},
          {"history.budgets", columns(1, 1).squeeze(1)},
          {"history.ranks", columns(2, choices.size(1) - 2)},
          {"history.scores", summaries.clone()}};
}

}  // namespace

std::map<std::string, at::Tensor> RankAllocator::options_state() const {
  return options_of(options_, schedule_);
}

std::map<std::string, at::Tensor> RankAllocator::state() const {
  const kernels::Progress now = progress_of(progress_);
  State state = options_state();
  state.merge(history_state(choices_.narrow(0, 0, now.recorded).cpu(),
                            summaries_.narrow(0, 0, now.recorded).cpu()));
  state["steps"] = number(now.steps);
  state["skipped_steps"] = number(now.skipped_steps);
  state["frozen"] = number(int64_t{frozen_});
  state["shrunk"] = number(int64_t{shrunk_});
  for (const auto& [name, kept] : pattern()) state[name + ".kept"] = kept;
  for (size_t i = 0; i < sensitivity_.size(); ++i) {
    const std::string factor = adapters_[i / 3].name + "." + factor_names[i % 3];
    state[factor + ".sensitivity"] = sensitivity_[i].clone();
    state[factor + ".uncertainty"] = uncertainty_[i].clone();
  }
  return state;
}

void RankAllocator::load_state(const std::map<std::string, at::Tensor>& state, bool at_work) {
  const std::vector<int64_t> initial_ranks = ranks_in(state);
  const BudgetSchedule schedule = schedule_from(initial_ranks);
  StateCheck check("RankAllocator", state);
  for (const auto& [name, value] : options_of(options_, schedule)) check.equal(name, value);
  for (const char* name : {"steps", "skipped_steps", "frozen", "shrunk"})
    check.tensor(name, at::kLong, {});
  check.within("steps", -1, many_steps);  // before a step 0, as PEFT counts
  check.within("skipped_steps", 0, many_steps);
  const auto it = state.find("frozen");
  const bool frozen = it != state.end() && kind_without_memory(it->second).empty() &&
                      it->second.numel() == 1 && it->second.item<double>() != 0;
  check.within("frozen", 0, 1);
  check.within("shrunk", 0, frozen && options_.shrink());
  const auto adapters = static_cast<int64_t>(adapters_.size());
  check.tensor("history.steps", at::kLong, {-1});
  const auto steps = state.find("history.steps");
  const int64_t n = steps != state.end() && kind_without_memory(steps->second).empty()
                        ? steps->second.numel()
                        : -1;
  check.tensor("history.budgets", at::kLong, {n});
  check.tensor("history.ranks", at::kLong, {n, adapters});
  check.tensor("history.scores", at::kDouble, {n, 4});
  for (size_t m = 0; m < adapters_.size(); ++m) {
    const Adapter& adapter = adapters_[m];
    check.tensor(adapter.name + ".kept", at::kBool, {initial_ranks[m]});
    const std::array<at::Tensor, 3> factors = adapter.factors();
    for (size_t f = 0; !frozen && f < factors.size(); ++f) {
      const auto dtype = at::toOpMathType(factors[f].scalar_type());
      for (const char* kind : {".sensitivity", ".uncertainty"})
        check.tensor(adapter.name + "." + factor_names[f] + kind, dtype, factors[f].sizes().vec());
    }
  }
  check.finish();
  TORCH_CHECK(in_charge(),
              "RankAllocator: another allocator was made for the same adapters, or "
              "detach() was called; load the state into the one that is in charge");

  const auto integer = [&](const char* name) { return state.at(name).item<int64_t>(); };
  if (initial_ranks != initial_ranks_) begin_with(initial_ranks);
  frozen_ = frozen;
  shrunk_ = integer("shrunk") != 0;
  choices_ =
      at::cat({state.at("history.steps").cpu().unsqueeze(1),
               state.at("history.budgets").cpu().unsqueeze(1), state.at("history.ranks").cpu()},
              1);
  summaries_ = state.at("history.scores").cpu().clone(at::MemoryFormat::Contiguous);
  budgets_ = frozen_ ? number(schedule_.final_budget()).reshape({1}) : at::empty({0}, at::kLong);
  set_progress(tensor_of({.steps = integer("steps"),
                          .skipped_steps = integer("skipped_steps"),
                          .budget = -1,
                          .recorded = n}));
  calls_ = integer("steps") + integer("skipped_steps");
  meet_anew();
  *stepped_ = at_work && (calls_ > 0 || frozen_);
  sensitivity_.clear();
  uncertainty_.clear();
  if (!frozen_) allocate_averages();
  std::vector<at::Tensor> kept;
  for (size_t m = 0; m < adapters_.size(); ++m) {
    Adapter& adapter = adapters_[m];
    kept.push_back(state.at(adapter.name + ".kept").cpu());
    const at::Tensor here =
        shrunk_ ? kept.back().nonzero().squeeze(1) : at::arange(initial_ranks_[m]);
    arrange(m, here);
    adapter.change_rank(here.numel());
    for (size_t f = 0; !frozen_ && f < factor_names.size(); ++f) {
      const std::string factor = adapter.name + "." + factor_names[f];
      sensitivity_[3 * m + f].copy_(state.at(factor + ".sensitivity"));
      uncertainty_[3 * m + f].copy_(state.at(factor + ".uncertainty"));
    }
  }
  kept_ = at::cat(kept);
  place();
}

}  // namespace rankwise
