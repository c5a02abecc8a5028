// RankAllocator: where the schedule stands, which is written where the adapters are, and what the
// host knows of it.
#include <ATen/ATen.h>
#include <rankwise/rank_allocator.h>

#include <algorithm>

#include "../ops/importance.h"

namespace rankwise {
namespace {

// Memory for integers to and from a device: from pinned memory CUDA copies without waiting.
at::Tensor on_host(at::IntArrayRef sizes, const at::Device& device) {
  return at::empty(sizes, at::TensorOptions(at::kLong).pinned_memory(device.is_cuda()));
}

// Read as often as asked: a device may be writing it.
const volatile kernels::Progress* heard_of(const at::Tensor& progress) {
  return static_cast<const volatile kernels::Progress*>(progress.const_data_ptr());
}

}  // namespace

int64_t RankAllocator::steps() const {
  return progress_of(progress_).steps;
}

int64_t RankAllocator::skipped_steps() const {
  return progress_of(progress_).skipped_steps;
}

int64_t RankAllocator::budget() const {
  return frozen_ ? schedule_.final_budget() : schedule_.budget(steps());
}

std::vector<Allocation> RankAllocator::history() const {
  const int64_t recorded = progress_of(progress_).recorded;
  const at::Tensor choices = choices_.narrow(0, 0, recorded).cpu();
  const at::Tensor summaries = summaries_.narrow(0, 0, recorded).cpu();
  std::vector<Allocation> result;
  for (int64_t i = 0; i < recorded; ++i) {
    const int64_t* const row = choices.const_data_ptr<int64_t>() + i * choices.size(1);
    const double* const score = summaries.const_data_ptr<double>() + i * summaries.size(1);
    result.push_back({row[0], row[1], std::vector<int64_t>(row + 2, row + choices.size(1)),
                      score[0], score[1], score[2], score[3]});
  }
  return result;
}

// At most so many steps were taken: all but those known to be skipped.
int64_t RankAllocator::most_steps() const {
  return calls_ - heard_of(heard_)->skipped_steps;
}

// Budgets of the steps up to this one and as many again, and rows for all their choices and one of
// freeze().
void RankAllocator::make_room(int64_t step) {
  if (frozen_ || step < budgets_.numel()) return;
  const int64_t last = options_.freeze_step();
  const int64_t count =
      (step > last / 2 ? last : std::min(std::max<int64_t>(2 * step, 1024), last)) + 1;
  const at::Tensor budgets = on_host({count}, budgets_.device());
  int64_t rows = choices_.size(0) + 1;
  for (int64_t t = 0; t < count; ++t) {
    const bool allocates = schedule_.allocates(t);
    budgets.mutable_data_ptr<int64_t>()[t] = allocates ? schedule_.budget(t) : -1;
    rows += allocates && t >= budgets_.numel();
  }
  budgets_ = budgets.to(budgets_.device(), /*non_blocking=*/true);
  for (at::Tensor* history : {&choices_, &summaries_}) {
    const at::Tensor more = at::empty({rows, history->size(1)}, history->options());
    more.narrow(0, 0, history->size(0)).copy_(*history);
    *history = more;
  }
}

void RankAllocator::set_progress(const at::Tensor& progress) {
  progress_ = progress;
  if (progress.is_cpu()) {
    heard_ = progress;
  } else {
    heard_.copy_(progress, /*non_blocking=*/true);
  }
}

// Puts what steps work on where the adapters are, which a module's to() may have moved.
void RankAllocator::place() {
  const at::Device device = adapters_[0].lora_E.device();
  if (progress_.device() == device) return;
  const at::Tensor progress = progress_.cpu();
  for (at::Tensor* tensor : {&progress_, &kept_, &budgets_, &choices_, &summaries_})
    *tensor = tensor->to(device);
  heard_ = device.is_cpu() ? progress_ : on_host(progress.sizes(), device).copy_(progress);
}

void RankAllocator::warn_of_zeros() {
  if (warned_of_zeros_ || !heard_of(heard_)->zeros) return;
  warned_of_zeros_ = true;
  TORCH_WARN("RankAllocator: all gradients are zero: were they cleared before the step ended?");
}

}  // namespace rankwise
