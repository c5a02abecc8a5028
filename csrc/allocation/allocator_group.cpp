// Allocator in a group of processes: when they meet, and that all decide alike.
//
// Each process decides by itself from gradients that were averaged, and the group compares the bits
// that it decided by: nothing is sent from one to the others, for a process whose scores differ has
// other weights, which taking over a choice would hide. The first gathering has a fixed size; only
// where it differs a second one tells the adapters apart.
//
// Meetings are at calls of step(), not at the schedule's steps: a process that skipped a step alone
// is behind, and would come to the step's meeting a call later, or find others gathering gradients.
// A call is that of an allocation when the steps that all have skipped are as many as at the last
// meeting; if they became more since, the same on all, the meeting decides nothing and the next one
// is by as many calls later.
#include <ATen/ATen.h>
#include <rankwise/allocator.h>

#include "group_decision.h"

namespace rankwise {
namespace {

std::vector<at::Tensor> gathered(const std::string& owner, const AllGather& all_gather,
                                 const at::Tensor& mine) {
  std::vector<at::Tensor> all = all_gather(mine);
  TORCH_CHECK(!all.empty(), owner, ": all_gather must return a tensor for each process, got none");
  for (at::Tensor& tensor : all) {
    TORCH_CHECK(tensor.defined() && tensor.scalar_type() == at::kLong && tensor.is_cpu() &&
                    tensor.numel() == mine.numel(),
                owner, ": all_gather must return int64 tensors of ", mine.numel(),
                " elements on the CPU");
    tensor = tensor.contiguous();
  }
  return all;
}

}  // namespace

void Allocator::set_group(AllGather all_gather) {
  all_gather_ = std::move(all_gather);
  meet_anew();
}

bool Allocator::meets_now() const {
  if (!met_before_) return true;
  return !frozen() && plan().allocates(calls() + 1 - agreed_skipped_);
}

void Allocator::in_group(bool meets, const std::function<void()>& take) {
  meets_ = meets && all_gather_;
  try {
    take();
  } catch (...) {
    if (meets_) tell_failure();
    meets_ = false;
    throw;
  }
}

// So that the others do not wait for this process; what it throws is more than what they say.
void Allocator::tell_failure() const {
  try {
    all_gather_(Standing{.failed = 1}.tensor());
  } catch (const std::exception&) {
  }
}

void Allocator::unless_agreed(const std::vector<at::Tensor>& tensors,
                              const std::function<void()>& change) {
  if (!meets_) return change();
  std::vector<at::Tensor> before;
  for (const at::Tensor& tensor : tensors)
    before.push_back(tensor.defined() ? tensor.clone() : tensor);
  try {
    change();
  } catch (...) {
    for (size_t i = 0; i < tensors.size(); ++i)
      if (tensors[i].defined()) tensors[i].copy_(before[i]);
    throw;
  }
}

// Of each adapter what it is and its scores; then of each what was chosen.
std::vector<int64_t> Allocator::digests_of(const Decision& decision) const {
  std::vector<int64_t> digests;
  for (size_t m = 0; m < adapters_.size(); ++m) {
    Digest digest;
    digest.add(adapters_[m].name).add(adapters_[m].rank);
    for (const at::Tensor& factor : adapters_[m].factors())
      for (const int64_t size : factor.defined() ? factor.sizes() : at::IntArrayRef{})
        digest.add(size);
    if (!decision.scores.empty()) digest.add(decision.scores[m]);
    digests.push_back(digest.value());
  }
  digests.insert(digests.end(), decision.choices.begin(), decision.choices.end());
  digests.resize(2 * adapters_.size());
  return digests;
}

void Allocator::agree(const Decision& mine) {
  meets_ = false;
  const std::vector<int64_t> own = digests_of(mine);
  Digest options, adapters;
  options.add(entry_).add(static_cast<int64_t>(adapters_.size()));
  for (const auto& [name, value] : options_state()) options.add(name).add(value);
  for (const int64_t digest : own) adapters.add(digest);
  const Standing standing{0,           mine.freezes,    mine.steps,      mine.skipped_steps,
                          mine.budget, options.value(), adapters.value()};
  std::vector<Standing> all;
  for (const at::Tensor& one : gathered(owner_, all_gather_, standing.tensor()))
    all.push_back(Standing::of(one));
  std::string differs = difference(all);
  std::vector<int64_t> digests;
  for (const Standing& one : all) digests.push_back(one.adapters);
  if (differs.empty() && !processes_apart(digests).empty()) differs = first_difference(own);
  TORCH_CHECK(differs.empty(), owner_, ": the processes of its group do not decide alike at step ",
              mine.steps, ": ", differs,
              ". Nothing was changed. All must begin with the same "
              "factors and average their gradients before the optimizer's step "
              "(DistributedDataParallel, or all_reduce); processes that train models of their own "
              "are no group: set_group({}) in C++, group=None in Python");
  agreed_skipped_ = mine.skipped_steps;
  met_before_ = true;
}

std::string Allocator::first_difference(const std::vector<int64_t>& own) const {
  const std::vector<at::Tensor> all = gathered(owner_, all_gather_, at::tensor(own, at::kLong));
  for (size_t i = 0; i < own.size(); ++i) {
    std::vector<int64_t> values;
    for (const at::Tensor& one : all) values.push_back(one.const_data_ptr<int64_t>()[i]);
    if (const std::string who = processes_apart(values); !who.empty())
      return who + " differs, first in '" + adapters_[i % adapters_.size()].name + "'";
  }
  return "they differ";
}

}  // namespace rankwise
