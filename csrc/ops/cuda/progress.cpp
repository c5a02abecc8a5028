// AdaLoRA's schedule and history on CUDA. Nothing waits for the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../../kernels/allocation/progress_kernels.h"
#include "../importance.h"
#include "../importance_checks.h"
#include "../importance_composite.h"
#include "device_table.h"
#include "launch.h"
#include "path.h"

namespace rankwise {
namespace {

kernels::Progress* pointer_to(const at::Tensor& progress) {
  return static_cast<kernels::Progress*>(progress.mutable_data_ptr());
}

at::Tensor schedule_step_cuda(const at::Tensor& progress, const std::optional<at::Tensor>& found,
                              const std::optional<at::Tensor>& found_inf, const at::Tensor& budgets,
                              int64_t freeze_step) {
  constexpr const char* op = "schedule_step";
  const at::Device device = progress.device();
  const c10::cuda::CUDAGuard guard(device);
  if (!has_kernels(device)) {
    return schedule_step_composite(progress, found, found_inf, budgets, freeze_step);
  }
  check_schedule_step(progress, budgets);
  check_device(op, "tensors", budgets, device);
  if (found) check_device(op, "tensors", *found, device);
  at::Tensor inf;
  if (found_inf) {
    check_device(op, "tensors", *found_inf, device);
    inf = found_inf->reshape({});  // one number
    if (!at::isFloatingType(inf.scalar_type())) inf = inf.to(at::kDouble);
  }
  const at::Tensor after = at::empty_like(progress);
  check_launch(kernels::launch_schedule_step(
      {pointer_to(progress), found ? found->const_data_ptr<bool>() : nullptr,
       found_inf ? inf.const_data_ptr() : nullptr,
       found_inf ? element_type(op, inf.scalar_type()) : kernels::ElementType::float32,
       budgets.const_data_ptr<int64_t>(), budgets.numel(), freeze_step, pointer_to(after)},
      current_stream()));
  return after;
}

void record_choice_cuda_(const at::Tensor& choices, const at::Tensor& summaries,
                         const at::Tensor& progress, const at::Tensor& scores,
                         const at::Tensor& kept, at::IntArrayRef ranks, int64_t freeze_step) {
  const at::Device device = progress.device();
  const c10::cuda::CUDAGuard guard(device);
  if (!has_kernels(device)) {
    return record_choice_composite_(choices, summaries, progress, scores, kept, ranks, freeze_step);
  }
  check_choice(choices, summaries, progress, scores, kept, ranks);
  for (const at::Tensor& tensor : {choices, summaries, scores, kept})
    check_device("record_choice", "tensors", tensor, device);
  std::vector<int64_t> offsets = {0};
  for (const int64_t rank : ranks) offsets.push_back(offsets.back() + rank);
  DeviceTable table;
  const size_t first_offset = table.add(offsets);
  table.upload(device);
  check_launch(kernels::launch_record_choice(
      {static_cast<int64_t>(ranks.size()), scores.numel(), scores.const_data_ptr<double>(),
       kept.const_data_ptr<bool>(), table.at<int64_t>(first_offset), freeze_step,
       pointer_to(progress), choices.mutable_data_ptr<int64_t>(),
       summaries.mutable_data_ptr<double>()},
      current_stream()));
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_schedule_step", &rankwise::schedule_step_cuda);
  m.impl("_record_choice_", &rankwise::record_choice_cuda_);
}
