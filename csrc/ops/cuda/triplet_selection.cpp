// The choice of triplets and their masks on CUDA. Nothing waits for the device.
#include "../../kernels/allocation/triplet_selection.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "../importance.h"
#include "../importance_checks.h"
#include "../importance_composite.h"
#include "device_table.h"
#include "launch.h"
#include "path.h"

namespace rankwise {
namespace {

const kernels::Progress* pointer_to(const at::Tensor& progress) {
  return static_cast<const kernels::Progress*>(progress.const_data_ptr());
}

void select_triplets_cuda_(const at::Tensor& kept, const at::Tensor& scores, at::IntArrayRef ranks,
                           at::IntArrayRef costs, int64_t min_rank, const at::Tensor& progress) {
  const at::Device device = scores.device();
  const c10::cuda::CUDAGuard guard(device);
  if (!has_kernels(device)) {
    return select_triplets_composite_(kept, scores, ranks, costs, min_rank, progress);
  }
  check_triplet_selection(kept, scores, ranks, costs, progress);
  for (const at::Tensor& tensor : {kept, progress})
    check_device("select_triplets", "tensors", tensor, device);
  const int64_t triplets = scores.numel();
  if (triplets == 0) return;

  std::vector<int64_t> offsets = {0};
  int64_t reserved = 0;
  for (size_t m = 0; m < ranks.size(); ++m) {
    offsets.push_back(offsets.back() + ranks[m]);
    reserved += std::clamp<int64_t>(min_rank, 0, ranks[m]) * costs[m];
  }
  DeviceTable table;
  const size_t first_offset = table.add(offsets), first_cost = table.add(costs.vec());
  table.upload(device);
  const at::Tensor scratch = at::empty({2 * triplets}, scores.options().dtype(at::kLong));
  check_launch(kernels::launch_select_triplets(
      {static_cast<int64_t>(ranks.size()), triplets, scores.const_data_ptr<double>(),
       table.at<int64_t>(first_offset), table.at<int64_t>(first_cost),
       *std::min_element(costs.begin(), costs.end()), reserved, min_rank, pointer_to(progress),
       scratch.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<bool>()},
      current_stream()));
}

void mask_triplets_cuda_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept,
                         const at::Tensor& progress) {
  constexpr const char* op = "mask_triplets";
  check_triplet_mask(lora_E, ranks, kept, progress);
  const at::Device device = kept.device();
  const c10::cuda::CUDAGuard guard(device);
  if (!has_kernels(device)) return mask_triplets_composite_(lora_E, ranks, kept, progress);
  check_device(op, "tensors", progress, device);
  std::vector<kernels::MaskEntry> entries;
  int64_t first = 0;
  for (size_t m = 0; m < ranks.size(); ++m) {
    const at::Tensor& E = lora_E[m];
    check_device(op, "tensors", E, device);
    element_type(op, E.scalar_type());
    entries.push_back({E.mutable_data_ptr(), E.stride(0), ranks[m], first, E.element_size()});
    first += ranks[m];
  }
  if (first == 0) return;
  DeviceTable table;
  const size_t start = table.add(entries);
  table.upload(device);
  check_launch(kernels::launch_mask_triplets(
      table.at<kernels::MaskEntry>(start), static_cast<int64_t>(entries.size()),
      kept.const_data_ptr<bool>(), pointer_to(progress), current_stream()));
  for (const at::Tensor& E : lora_E)
    E.unsafeGetTensorImpl()->bump_version();  // a graph that saved it will say so
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_select_triplets_", &rankwise::select_triplets_cuda_);
  m.impl("_mask_triplets_", &rankwise::mask_triplets_cuda_);
}
