// AdaLoRA's importance passes on CUDA: one table of all tensors, one launch for the check, two for
// a step with scores. Nothing waits for the device.
#include "../importance.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../../kernels/allocation/importance_kernels.h"
#include "../importance_checks.h"
#include "../importance_composite.h"
#include "device_table.h"
#include "launch.h"
#include "path.h"

namespace rankwise {
namespace {

constexpr const char* op = "importance";

at::Tensor importance_check_cuda(at::TensorList gradients) {
  check_importance_gradients(gradients);
  const at::Device device = gradients[0].device();
  const c10::cuda::CUDAGuard guard(device);
  if (!has_kernels(device)) return importance_check_composite(gradients);
  std::vector<kernels::GradientEntry> entries;
  for (const at::Tensor& gradient : gradients) {
    check_device(op, "gradients", gradient, device);
    entries.push_back(
        {gradient.const_data_ptr(), gradient.numel(), element_type(op, gradient.scalar_type())});
  }
  const auto count = static_cast<int64_t>(entries.size());
  const int64_t blocks = kernels::lay_out(entries.data(), count);
  const at::Tensor found = at::zeros({2}, gradients[0].options().dtype(at::kBool));
  if (blocks == 0) return found;
  DeviceTable table;
  const size_t start = table.add(entries);
  table.upload(device);
  check_launch(kernels::launch_importance_check(table.at<kernels::GradientEntry>(start), count,
                                                blocks, found.mutable_data_ptr<bool>(),
                                                current_stream()));
  return found;
}

// The table of all factors: A, B and E of each adapter in turn.
std::vector<kernels::FactorEntry> factor_entries(at::TensorList parameters,
                                                 const std::vector<at::Tensor>& gradients,
                                                 at::TensorList sensitivity,
                                                 at::TensorList uncertainty) {
  std::vector<kernels::FactorEntry> entries;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& p = parameters[i];
    check_device(op, "parameters", p, parameters[0].device());
    const bool is_E = i % 3 == 2;  // [capacity, 1], as [1, capacity]
    entries.push_back(
        {p.const_data_ptr(), gradients[i].defined() ? gradients[i].const_data_ptr() : nullptr,
         sensitivity[i].mutable_data_ptr(), uncertainty[i].mutable_data_ptr(), p.size(is_E ? 1 : 0),
         p.size(is_E ? 0 : 1), element_type(op, p.scalar_type()), i % 3 == 0});
  }
  return entries;
}

std::vector<int64_t> offsets_of(at::TensorList parameters, at::IntArrayRef ranks) {
  std::vector<int64_t> offsets = {0};
  for (size_t m = 0; m < ranks.size(); ++m) {
    const at::Tensor &A = parameters[3 * m], &B = parameters[3 * m + 1], &E = parameters[3 * m + 2];
    const int64_t capacity = A.size(0);
    TORCH_CHECK(B.size(1) == capacity && E.size(0) == capacity && E.size(1) == 1 && ranks[m] >= 0 &&
                    ranks[m] <= capacity,
                "importance: adapter ", m,
                " must have A [capacity, in], B [out, capacity], E "
                "[capacity, 1] and a rank up to the capacity, got ",
                A.sizes(), ", ", B.sizes(), ", ", E.sizes(), " and ", ranks[m]);
    offsets.push_back(offsets.back() + ranks[m]);
  }
  return offsets;
}

at::Tensor importance_step_cuda_(at::TensorList parameters,
                                 const c10::List<std::optional<at::Tensor>>& gradients,
                                 at::TensorList sensitivity, at::TensorList uncertainty,
                                 at::IntArrayRef ranks, double beta1, double beta2, bool score,
                                 const std::optional<at::Tensor>& progress) {
  const std::vector<at::Tensor> present =
      check_importance_step(parameters, gradients, sensitivity, uncertainty, ranks);
  const at::Device device = parameters[0].device();
  const c10::cuda::CUDAGuard guard(device);
  if (!has_kernels(device)) {
    return importance_step_composite_(parameters, gradients, sensitivity, uncertainty, ranks, beta1,
                                      beta2, score, progress);
  }
  std::vector<kernels::FactorEntry> entries =
      factor_entries(parameters, present, sensitivity, uncertainty);
  const std::vector<int64_t> offsets = offsets_of(parameters, ranks);
  const auto count = static_cast<int64_t>(entries.size());
  const kernels::FactorBlocks blocks = kernels::lay_out(entries.data(), count);
  const at::TensorOptions options = at::TensorOptions(at::kDouble).device(device);
  const at::Tensor scores = at::empty({offsets.back()}, options);
  if (blocks.blocks == 0 && scores.numel() == 0) return scores;

  const kernels::Progress* now = nullptr;
  if (progress) {
    check_progress(op, *progress);
    check_device(op, "tensors", *progress, device);
    now = static_cast<const kernels::Progress*>(progress->const_data_ptr());
  }
  DeviceTable table;
  const size_t first_factor = table.add(entries), first_offset = table.add(offsets);
  table.upload(device);
  const auto* const factors = table.at<kernels::FactorEntry>(first_factor);
  const at::Tensor partials = at::empty({score ? blocks.partials : 0}, options);
  double* const parts = score ? partials.mutable_data_ptr<double>() : nullptr;
  check_launch(kernels::launch_importance_step(
      {factors, count, blocks.blocks, beta1, beta2, now, parts}, current_stream()));
  if (!score || scores.numel() == 0) return scores;
  check_launch(kernels::launch_importance_scores(
      factors, table.at<int64_t>(first_offset), static_cast<int64_t>(ranks.size()), now, parts,
      scores.mutable_data_ptr<double>(), current_stream()));
  return scores;
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_importance_check", &rankwise::importance_check_cuda);
  m.impl("_importance_step_", &rankwise::importance_step_cuda_);
}
