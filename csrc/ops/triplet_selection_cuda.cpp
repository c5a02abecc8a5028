// The choice of triplets and their masks on CUDA. Nothing waits for the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "../kernels/triplet_selection.h"
#include "cuda_launch.h"
#include "device_table.h"
#include "importance.h"
#include "importance_checks.h"

namespace rankwise {
namespace {

at::Tensor select_triplets_cuda(const at::Tensor& scores, at::IntArrayRef ranks,
                                at::IntArrayRef costs, int64_t budget, int64_t min_rank) {
  check_triplet_selection(scores, ranks, costs);
  const c10::cuda::CUDAGuard guard(scores.device());
  const int64_t triplets = scores.numel();
  if (triplets > kernels::most_triplets) {
    return select_triplets(scores.cpu(), ranks, costs, budget, min_rank).to(scores.device());
  }
  const at::Tensor kept = at::empty({triplets}, scores.options().dtype(at::kBool));
  if (triplets == 0) return kept;

  std::vector<int64_t> offsets = {0};
  for (size_t m = 0; m < ranks.size(); ++m) {
    offsets.push_back(offsets.back() + ranks[m]);
    budget -= std::clamp<int64_t>(min_rank, 0, ranks[m]) * costs[m];
  }
  DeviceTable table;
  const size_t first_offset = table.add(offsets), first_cost = table.add(costs.vec());
  table.upload(scores.device());
  const at::Tensor scratch = at::empty({2 * triplets}, scores.options().dtype(at::kLong));
  check_launch(kernels::launch_select_triplets(
      {static_cast<int64_t>(ranks.size()), triplets, scores.const_data_ptr<double>(),
       table.at<int64_t>(first_offset), table.at<int64_t>(first_cost),
       *std::min_element(costs.begin(), costs.end()), budget, min_rank,
       scratch.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<bool>()},
      current_stream()));
  return kept;
}

// `kept` may lie on the CPU, where allocators have it.
void mask_triplets_cuda_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept) {
  constexpr const char* op = "mask_triplets";
  check_triplet_mask(lora_E, ranks, kept);
  std::vector<kernels::MaskEntry> entries;
  int64_t first = 0;
  for (size_t m = 0; m < ranks.size(); ++m) {
    const at::Tensor& E = lora_E[m];
    check_device(op, "lora_E", E, lora_E[0].device());
    element_type(op, E.scalar_type());
    entries.push_back({E.mutable_data_ptr(), E.stride(0), ranks[m], first, E.element_size()});
    first += ranks[m];
  }
  if (first == 0) return;
  const at::Device device = lora_E[0].device();
  const c10::cuda::CUDAGuard guard(device);
  DeviceTable table;
  const size_t start = table.add(entries);
  size_t first_kept = 0;
  if (kept.is_cpu()) {
    const auto* const data = reinterpret_cast<const uint8_t*>(kept.const_data_ptr<bool>());
    first_kept = table.add(std::vector<uint8_t>(data, data + kept.numel()));
  } else {
    check_device(op, "tensors", kept, device);
  }
  table.upload(device);
  check_launch(kernels::launch_mask_triplets(
      table.at<kernels::MaskEntry>(start), static_cast<int64_t>(entries.size()),
      kept.is_cpu() ? table.at<bool>(first_kept) : kept.const_data_ptr<bool>(), current_stream()));
  for (const at::Tensor& E : lora_E)
    E.unsafeGetTensorImpl()->bump_version();  // a graph that saved it will say so
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_select_triplets", &rankwise::select_triplets_cuda);
  m.impl("_mask_triplets_", &rankwise::mask_triplets_cuda_);
}
