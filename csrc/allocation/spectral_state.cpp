// SpectralAllocator's state as named tensors: what a checkpoint holds.
//
//   options.<name>          0-d, compared on loading
//   steps, skipped_steps, budget                           0-d int64
//   <adapter>.columns       int64 [rank, 2]: events, birth of each direction
//   <adapter>.sensitivity   float64 [rank]
//   <adapter>.young_A [n, in], .young_B [out, n]   new directions on the ramp, before a step
//   <adapter>.probes        0-d int64
//   <adapter>.former        float64 [capacity]: scores of dropped directions
//   history.steps, .budgets, .banks [n], .ranks [n, adapters], .moves [n, 2], .values [n, 3]
#include <ATen/ATen.h>
#include <rankwise/spectral_allocator.h>

#include <algorithm>

#include "spectral_directions.h"
#include "state_check.h"

namespace rankwise {
namespace {

using State = std::map<std::string, at::Tensor>;

State options_of(const SpectralOptions& o) {
  return {{"options.total_steps", number(o.total_steps())},
          {"options.warmup_steps", number(o.warmup_steps())},
          {"options.final_steps", number(o.final_steps())},
          {"options.allocation_interval", number(o.allocation_interval())},
          {"options.min_rank", number(o.min_rank())},
          {"options.max_rank", number(o.max_rank())},
          {"options.initial_budget", number(o.initial_budget())},
          {"options.final_budget", number(o.final_budget())},
          {"options.literal_score", number(int64_t{o.score() == SpectralScore::literal})},
          {"options.sensitivity_weight", number(o.sensitivity_weight())},
          {"options.beta", number(o.beta())},
          {"options.threshold", number(o.exchange().threshold)},
          {"options.hysteresis", number(o.exchange().hysteresis)},
          {"options.max_moves", number(o.exchange().max_moves)},
          {"options.growth", number(static_cast<int64_t>(o.exchange().growth))},
          {"options.kth_least", number(o.exchange().kth_least)},
          {"options.probes", number(o.probes())},
          {"options.min_age", number(o.min_age())},
          {"options.ramp_steps", number(o.ramp_steps())},
          {"options.seed", number(o.seed())}};
}

State history_state(const std::vector<SpectralEvent>& history, int64_t adapters) {
  const auto n = static_cast<int64_t>(history.size());
  const at::TensorOptions integers(at::kLong);
  State state = {{"history.steps", at::empty({n}, integers)},
                 {"history.budgets", at::empty({n}, integers)},
                 {"history.banks", at::empty({n}, integers)},
                 {"history.ranks", at::empty({n, adapters}, integers)},
                 {"history.moves", at::empty({n, 2}, integers)},
                 {"history.values", at::empty({n, 3}, at::kDouble)}};
  for (int64_t i = 0; i < n; ++i) {
    const SpectralEvent& event = history[i];
    state["history.steps"][i] = event.step;
    state["history.budgets"][i] = event.budget;
    state["history.banks"][i] = event.bank;
    state["history.ranks"][i] = at::tensor(event.ranks, integers);
    state["history.moves"][i] = at::tensor({event.dropped, event.added}, integers);
    state["history.values"][i] =
        at::tensor({event.change, event.lowest_kept, event.highest_dropped}, at::kDouble);
  }
  return state;
}

std::vector<SpectralEvent> history_in(const State& state) {
  std::vector<SpectralEvent> history;
  const auto integers = [&](const char* name) { return state.at(name).cpu().contiguous(); };
  const at::Tensor steps = integers("history.steps"), budgets = integers("history.budgets"),
                   banks = integers("history.banks"), ranks = integers("history.ranks"),
                   moves = integers("history.moves"), values = integers("history.values");
  for (int64_t i = 0; i < steps.numel(); ++i) {
    const auto* const row = ranks.const_data_ptr<int64_t>() + i * ranks.size(1);
    const auto* const moved = moves.const_data_ptr<int64_t>() + 2 * i;
    const auto* const value = values.const_data_ptr<double>() + 3 * i;
    history.push_back({.step = steps.const_data_ptr<int64_t>()[i],
                       .budget = budgets.const_data_ptr<int64_t>()[i],
                       .bank = banks.const_data_ptr<int64_t>()[i],
                       .ranks = {row, row + ranks.size(1)},
                       .dropped = moved[0],
                       .added = moved[1],
                       .change = value[0],
                       .lowest_kept = value[1],
                       .highest_dropped = value[2]});
  }
  return history;
}

}  // namespace

std::map<std::string, at::Tensor> SpectralAllocator::options_state() const {
  return options_of(options_);
}

std::map<std::string, at::Tensor> SpectralAllocator::state() const {
  State state = options_state();
  state.merge(history_state(history_, static_cast<int64_t>(adapters_.size())));
  state["steps"] = number(steps_);
  state["skipped_steps"] = number(skipped_steps_);
  state["budget"] = number(budget_);
  for (size_t m = 0; m < adapters_.size(); ++m) {
    const Adapter& adapter = adapters_[m];
    const auto rank = static_cast<int64_t>(columns_[m].size());
    at::Tensor columns = at::empty({rank, 2}, at::kLong);
    at::Tensor sensitivity = at::empty({rank}, at::kDouble);
    for (int64_t i = 0; i < rank; ++i) {
      const Column& column = columns_[m][i];
      columns.mutable_data_ptr<int64_t>()[2 * i] = column.events;
      columns.mutable_data_ptr<int64_t>()[2 * i + 1] = column.birth;
      sensitivity.mutable_data_ptr<double>()[i] = column.sensitivity;
    }
    const at::TensorOptions on_cpu(adapter.lora_A.scalar_type());
    std::vector<at::Tensor> A = {at::empty({0, adapter.lora_A.size(1)}, on_cpu)};
    std::vector<at::Tensor> B = {at::empty({adapter.lora_B.size(0), 0}, on_cpu)};
    for (const Young& young : young_) {
      if (young.adapter != m) continue;
      A.push_back(young.A.cpu().unsqueeze(0));
      B.push_back(young.B.cpu().unsqueeze(1));
    }
    state[adapter.name + ".columns"] = columns;
    state[adapter.name + ".probes"] = number(adapter.probes);
    state[adapter.name + ".former"] = at::tensor(former_[m], at::kDouble);
    state[adapter.name + ".sensitivity"] = sensitivity;
    state[adapter.name + ".young_A"] = at::cat(A, 0);
    state[adapter.name + ".young_B"] = at::cat(B, 1);
  }
  return state;
}

void SpectralAllocator::load_state(const std::map<std::string, at::Tensor>& state, bool at_work) {
  StateCheck check(owner_, state);
  for (const auto& [name, value] : options_state()) check.equal(name, value);
  for (const char* name : {"steps", "skipped_steps", "budget"}) {
    check.tensor(name, at::kLong, {});
    check.within(name, 0, many_steps);
  }
  const auto adapters = static_cast<int64_t>(adapters_.size());
  const int64_t n = check.rows("history.steps");
  for (const char* name : {"history.steps", "history.budgets", "history.banks"})
    check.tensor(name, at::kLong, {n});
  check.tensor("history.ranks", at::kLong, {n, adapters});
  check.tensor("history.moves", at::kLong, {n, 2});
  check.tensor("history.values", at::kDouble, {n, 3});
  for (size_t m = 0; m < adapters_.size(); ++m) {
    const Adapter& adapter = adapters_[m];
    const auto dtype = adapter.lora_A.scalar_type();
    const int64_t rank = check.rows(adapter.name + ".sensitivity");
    check.tensor(adapter.name + ".sensitivity", at::kDouble, {-1});
    check.finite(adapter.name + ".sensitivity");
    check.tensor(adapter.name + ".columns", at::kLong, {rank, 2});
    check.within(adapter.name + ".columns", 0, many_steps);
    check.tensor(adapter.name + ".probes", at::kLong, {});
    check.within(adapter.name + ".probes", 0, adapter.lora_A.size(0) - rank);
    check.tensor(adapter.name + ".former", at::kDouble, {adapter.lora_A.size(0)});
    const int64_t young = check.rows(adapter.name + ".young_A");
    check.tensor(adapter.name + ".young_A", dtype, {std::min(young, rank), adapter.lora_A.size(1)});
    check.tensor(adapter.name + ".young_B", dtype, {adapter.lora_B.size(0), young});
    if (rank > highest(m))
      check.fault(adapter.name + ".sensitivity: a rank of at most " + std::to_string(highest(m)) +
                  " was expected, got " + std::to_string(rank));
  }
  check.finish();
  TORCH_CHECK(in_charge(), owner_,
              ": another allocator was made for the same adapters, or detach() was called; load "
              "the state into the one that is in charge");

  steps_ = state.at("steps").item<int64_t>();
  skipped_steps_ = state.at("skipped_steps").item<int64_t>();
  budget_ = state.at("budget").item<int64_t>();
  *stepped_ = at_work && steps_ + skipped_steps_ > 0;
  meet_anew();
  history_ = history_in(state);
  young_.clear();
  for (size_t m = 0; m < adapters_.size(); ++m) {
    Adapter& adapter = adapters_[m];
    const at::Tensor columns = state.at(adapter.name + ".columns").cpu().contiguous();
    const at::Tensor sensitivity = state.at(adapter.name + ".sensitivity").cpu().contiguous();
    const at::Tensor former = state.at(adapter.name + ".former").cpu().contiguous();
    const auto* const scores = former.const_data_ptr<double>();
    former_[m].assign(scores, scores + former.numel());
    const at::Tensor A = state.at(adapter.name + ".young_A");
    const at::Tensor B = state.at(adapter.name + ".young_B");
    columns_[m].clear();
    for (int64_t i = 0; i < columns.size(0); ++i) {
      const auto* const row = columns.const_data_ptr<int64_t>() + 2 * i;
      columns_[m].push_back({sensitivity.const_data_ptr<double>()[i], row[0], row[1]});
    }
    const int64_t young = std::min(A.size(0), B.size(1)), first = columns.size(0) - young;
    for (int64_t i = 0; i < young; ++i)
      young_.push_back({m, first + i, A.select(0, i).clone(), B.select(1, i).clone()});
    adapter.change_rank(columns.size(0));
    adapter.probe(state.at(adapter.name + ".probes").item<int64_t>());
  }
}

}  // namespace rankwise
