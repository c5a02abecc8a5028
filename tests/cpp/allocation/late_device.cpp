#include "late_device.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ops/importance.h>
#include <torch/library.h>

#include <cstdlib>
#include <deque>
#include <functional>

namespace late_device {
namespace {

std::deque<std::function<void()>> queue;
int64_t waited = 0;

void wait() {
  ++waited;
  proceed(static_cast<int64_t>(queue.size()));
}

struct Memory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = std::malloc(bytes + 1);
    return {data, data, &std::free, device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Memory memory;

at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype) {
  return at::empty(size, at::TensorOptions(dtype).device(device()));
}

// The same memory as a tensor of the CPU, for tasks; keeps the tensor alive.
at::Tensor memory_of(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  return at::from_blob(
      tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {},
      tensor.options().device(at::kCPU));
}

std::vector<at::Tensor> memory_of(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor : tensors) result.push_back(memory_of(tensor));
  return result;
}

std::optional<at::Tensor> memory_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(memory_of(*tensor)) : std::nullopt;
}

void later(std::function<void()> task) {
  queue.push_back(std::move(task));
}

// What torch's own operations need.

at::Tensor empty_memory_format(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                               std::optional<at::Layout>, std::optional<at::Device>,
                               std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const bool within = self.device() == source.device();
  later([to = memory_of(self), from = memory_of(source)] { to.copy_(from); });
  if (!within && !non_blocking) wait();
  return self;
}

at::Tensor& fill(at::Tensor& self, const at::Scalar& value) {
  later([to = memory_of(self), value] { to.fill_(value); });
  return self;
}

at::Tensor& zero(at::Tensor& self) {
  return fill(self, 0);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  wait();
  return memory_of(self).item();
}

at::Tensor index_select(const at::Tensor& self, int64_t dim, const at::Tensor& index) {
  std::vector<int64_t> size = self.sizes().vec();
  size[dim] = index.numel();
  at::Tensor result = empty(size, self.scalar_type());
  later([to = memory_of(result), from = memory_of(self), dim, i = memory_of(index)] {
    to.copy_(from.index_select(dim, i));
  });
  return result;
}

// What rankwise's allocator needs.

at::Tensor importance_check(at::TensorList gradients) {
  at::Tensor found = empty({2}, at::kBool);
  later([to = memory_of(found), from = memory_of(gradients)] {
    to.copy_(rankwise::importance_check(from));
  });
  return found;
}

at::Tensor schedule_step(const at::Tensor& progress, const std::optional<at::Tensor>& found,
                         const std::optional<at::Tensor>& found_inf, const at::Tensor& budgets,
                         int64_t freeze_step) {
  at::Tensor next = empty(progress.sizes(), at::kLong);
  later([to = memory_of(next), now = memory_of(progress), found = memory_of(found),
         inf = memory_of(found_inf), budgets = memory_of(budgets), freeze_step] {
    to.copy_(rankwise::schedule_step(now, found, inf, budgets, freeze_step));
  });
  return next;
}

at::Tensor importance_step_(at::TensorList parameters,
                            const c10::List<std::optional<at::Tensor>>& gradients,
                            at::TensorList sensitivity, at::TensorList uncertainty,
                            at::IntArrayRef ranks, double beta1, double beta2, bool score,
                            const std::optional<at::Tensor>& progress) {
  c10::List<std::optional<at::Tensor>> present;
  for (const std::optional<at::Tensor> gradient : gradients) present.push_back(memory_of(gradient));
  int64_t directions = 0;
  for (const int64_t rank : ranks) directions += rank;
  at::Tensor scores = empty({directions}, at::kDouble);
  later([=, to = memory_of(scores), p = memory_of(parameters), s = memory_of(sensitivity),
         u = memory_of(uncertainty), ranks = ranks.vec(), now = memory_of(progress)] {
    to.copy_(rankwise::importance_step_(p, present, s, u, ranks, beta1, beta2, score, now));
  });
  return scores;
}

void select_triplets_(const at::Tensor& kept, const at::Tensor& scores, at::IntArrayRef ranks,
                      at::IntArrayRef costs, int64_t min_rank, const at::Tensor& progress) {
  later([=, kept = memory_of(kept), scores = memory_of(scores), ranks = ranks.vec(),
         costs = costs.vec(), now = memory_of(progress)] {
    rankwise::select_triplets_(kept, scores, ranks, costs, min_rank, now);
  });
}

void mask_triplets_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept,
                    const at::Tensor& progress) {
  later([E = memory_of(lora_E), ranks = ranks.vec(), kept = memory_of(kept),
         now = memory_of(progress)] { rankwise::mask_triplets_(E, ranks, kept, now); });
}

void record_choice_(const at::Tensor& choices, const at::Tensor& summaries,
                    const at::Tensor& progress, const at::Tensor& scores, const at::Tensor& kept,
                    at::IntArrayRef ranks, int64_t freeze_step) {
  later([=, choices = memory_of(choices), summaries = memory_of(summaries),
         now = memory_of(progress), scores = memory_of(scores), kept = memory_of(kept),
         ranks = ranks.vec()] {
    rankwise::record_choice_(choices, summaries, now, scores, kept, ranks, freeze_step);
  });
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::PrivateUse1>)

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
  m.impl("fill_.Scalar", &fill);
  m.impl("zero_", &zero);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("index_select", &index_select);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
}

TORCH_LIBRARY_IMPL(rankwise, PrivateUse1, m) {
  m.impl("_importance_check", &importance_check);
  m.impl("_schedule_step", &schedule_step);
  m.impl("_importance_step_", &importance_step_);
  m.impl("_select_triplets_", &select_triplets_);
  m.impl("_mask_triplets_", &mask_triplets_);
  m.impl("_record_choice_", &record_choice_);
}

}  // namespace

at::Device device() {
  return {c10::DeviceType::PrivateUse1, 0};
}

void overwrite(const at::Tensor& on_device, const at::Tensor& tensor) {
  on_device.copy_(tensor.clone(), /*non_blocking=*/true);
}

at::Tensor put(const at::Tensor& tensor) {
  at::Tensor result = empty(tensor.sizes(), tensor.scalar_type());
  overwrite(result, tensor);
  return result;
}

int64_t waits() {
  return waited;
}

void proceed(int64_t tasks) {
  for (; tasks > 0 && !queue.empty(); --tasks) {
    const auto task = std::move(queue.front());
    queue.pop_front();
    task();
  }
}

}  // namespace late_device
