// SpectralAllocator after a decision: factors, gradients and the optimizer's state follow, and
// probes come and go.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <rankwise/spectral_allocator.h>
#include <rankwise/tensor_memory.h>

#include <algorithm>

#include "../ops/cpu/blocks.h"
#include "gradient_sketch.h"
#include "spectral_directions.h"

namespace rankwise {
namespace {

std::optional<Moments> moments_of(const at::Tensor& factor, const OptimizerView& optimizer) {
  if (optimizer.moments_of) return optimizer.moments_of(factor);
  if (!optimizer.state_of) return Moments();
  const auto state = optimizer.state_of(factor);
  return state && state->empty() ? std::optional(Moments()) : std::nullopt;
}

// A tensor along a factor's elements, in a new basis: its leading columns times `map`, or its
// leading rows from the left by the map's transpose.
struct Move {
  at::Tensor tensor;
  int64_t dim;
  at::Tensor map;
  at::Tensor values = {};

  void fetch() { values = doubles(tensor.narrow(dim, 0, map.size(0))); }
  void compute() { values = dim == 1 ? values.matmul(map) : map.t().matmul(values); }
  void write() const {
    tensor.narrow(dim, 0, map.size(1)).copy_(values);
    tensor.narrow(dim, map.size(1), map.size(0) - map.size(1)).zero_();
  }
};

// One that shares no memory within itself.
at::Tensor own_gradient(const at::Tensor& factor) {
  if (has_overlap(factor.grad())) factor.mutable_grad() = factor.grad().clone();
  return factor.grad();
}

uint64_t mixed(uint64_t seed, uint64_t step, uint64_t adapter) {
  uint64_t x = seed;
  for (const uint64_t part : {step, adapter}) {  // splitmix64
    x += 0x9e3779b97f4a7c15 * (part + 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    x ^= x >> 31;
  }
  return x;
}

}  // namespace

// That the state of all whose rank falls, or that have probes, can follow.
void SpectralAllocator::check_optimizer(const std::vector<int64_t>& ranks,
                                        const OptimizerView& optimizer) const {
  for (size_t m = 0; m < ranks.size(); ++m) {
    const Adapter& adapter = adapters_[m];
    if (ranks[m] >= adapter.rank && adapter.probes == 0) continue;
    for (const at::Tensor& factor : {adapter.lora_A, adapter.lora_B}) {
      const auto moments = moments_of(factor, optimizer);
      TORCH_CHECK(moments, "SpectralAllocator: the optimizer's state of '", adapter.name,
                  "' cannot follow its directions: it must be averages of gradients and of their "
                  "squares, as of SGD, Adam, AdamW, RMSprop or Adagrad");
      for (const auto* kind : {&moments->first, &moments->second})
        for (const at::Tensor& state : *kind)
          TORCH_CHECK(state.sizes() == factor.sizes(),
                      "SpectralAllocator: optimizer state must be ", factor.sizes(),
                      " like the parameter, got ", state.sizes());
    }
  }
}

// Keeps the best `rank` directions of an adapter.
void SpectralAllocator::change(size_t m, const Found& found, int64_t rank,
                               const OptimizerView& optimizer) {
  Adapter& adapter = adapters_[m];
  std::vector<int64_t> kept(found.order.begin(), found.order.begin() + rank);
  std::ranges::sort(kept);
  const Repacked made = repacked(found.spectrum, kept, found.lengths);
  std::vector<Move> moves;
  const auto follow = [&](const at::Tensor& factor, int64_t dim, const at::Tensor& map) {
    if (factor.grad().defined()) moves.push_back({own_gradient(factor), dim, map});
    const Moments moments = moments_of(factor, optimizer).value();
    for (const at::Tensor& first : moments.first) moves.push_back({first, dim, map});
    for (const at::Tensor& second : moments.second) moves.push_back({second, dim, map.square()});
  };
  follow(adapter.lora_A, 0, made.T_B);
  follow(adapter.lora_B, 1, made.T_A);
  for (Move& move : moves) move.fetch();
  run_blocks(static_cast<int64_t>(moves.size()), [&](int64_t i) { moves[i].compute(); });
  for (const Move& move : moves) move.write();
  Move{adapter.lora_A, 0, made.T_B, made.A}.write();
  Move{adapter.lora_B, 1, made.T_A, made.B}.write();
  std::vector<Column> columns;
  for (const int64_t i : kept) columns.push_back(found.columns[i]);
  columns_[m] = std::move(columns);
  std::erase_if(young_, [&](const Young& young) { return young.adapter == m; });
  adapter.change_rank(rank);
}

// Gives an adapter new directions: nothing of its output changes.
void SpectralAllocator::add(size_t m, const Found& found, int64_t count) {
  Adapter& adapter = adapters_[m];
  const int64_t rank = adapter.rank;
  const at::Tensor A = doubles(adapter.lora_A.narrow(0, 0, rank));
  at::Tensor rows;
  const uint64_t seed = mixed(static_cast<uint64_t>(options_.seed()), steps_ + 1, m);
  run_blocks(
      1, [&](int64_t) { rows = fresh_rows(A, found.sketch.rows, count, seed) * row_length(A); });
  adapter.lora_A.narrow(0, rank, count).copy_(rows);
  adapter.lora_B.narrow(1, rank, count).zero_();
  for (int64_t column = rank; column < rank + count; ++column) {
    columns_[m].push_back({.birth = steps_ + 1});
    if (options_.ramp_steps() == 0) continue;
    young_.push_back({m, column, adapter.lora_A.select(0, column).clone(),
                      adapter.lora_B.select(1, column).clone()});
  }
  adapter.change_rank(rank + count);
}

// After the step before an event, for adapters that may gain.
void SpectralAllocator::insert_probes() {
  if (options_.probes() == 0 || !schedule_.allocates(steps_ + 1)) return;
  for (size_t m = 0; m < adapters_.size(); ++m) {
    Adapter& adapter = adapters_[m];
    const int64_t count = std::min(options_.probes(), highest(m) - adapter.rank);
    if (count <= 0) continue;
    const uint64_t seed = mixed(static_cast<uint64_t>(options_.seed()), steps_ + 1, m);
    adapter.lora_B.narrow(1, adapter.rank, count)
        .copy_(probe_columns(adapter.lora_B.size(0), count, seed));
    adapter.probe(count);
  }
}

// Leaves zeros where they were, in the optimizer's state too.
void SpectralAllocator::remove_probes(const OptimizerView& optimizer) {
  for (Adapter& adapter : adapters_) {
    if (adapter.probes == 0) continue;
    const auto clear = [&](const at::Tensor& factor, int64_t dim) {
      std::vector<at::Tensor> tensors = moments_of(factor, optimizer).value().all();
      tensors.push_back(factor);
      if (factor.grad().defined()) tensors.push_back(own_gradient(factor));
      for (const at::Tensor& tensor : tensors)
        tensor.narrow(dim, adapter.rank, adapter.probes).zero_();
    };
    clear(adapter.lora_A, 0);
    clear(adapter.lora_B, 1);
    adapter.change_rank(adapter.rank);
  }
}

void SpectralAllocator::detach() {
  const at::NoGradGuard no_grad;
  if (in_charge()) remove_probes({});
  Allocator::detach();
}

}  // namespace rankwise
