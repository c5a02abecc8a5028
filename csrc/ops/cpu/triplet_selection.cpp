// The choice of triplets and their masks on the CPU: exact, with ties in the order of directions.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../importance.h"
#include "../importance_checks.h"

namespace rankwise {
namespace {

void select_triplets_cpu_(const at::Tensor& kept, const at::Tensor& scores, at::IntArrayRef ranks,
                          at::IntArrayRef costs, int64_t min_rank, const at::Tensor& progress) {
  check_triplet_selection(kept, scores, ranks, costs, progress);
  int64_t budget = progress_of(progress).budget;
  if (budget < 0) return;
  std::vector<size_t> adapter;
  for (size_t m = 0; m < ranks.size(); ++m) adapter.insert(adapter.end(), ranks[m], m);
  const double* const score = scores.const_data_ptr<double>();
  std::vector<int64_t> order(adapter.size());
  std::iota(order.begin(), order.end(), 0);
  // A NaN is below all numbers: std::sort wants an order of everything.
  const auto above = [](double x, double y) { return x > y || (std::isnan(y) && !std::isnan(x)); };
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return above(score[a], score[b]) || (!above(score[b], score[a]) && a < b);
  });

  bool* const keep = kept.mutable_data_ptr<bool>();
  std::fill_n(keep, kept.numel(), false);
  std::vector<int64_t> count(ranks.size(), 0);
  const auto take = [&](int64_t i) {
    keep[i] = true;
    ++count[adapter[i]];
    budget -= costs[adapter[i]];
  };
  for (const int64_t i : order)
    if (count[adapter[i]] < min_rank) take(i);
  for (const int64_t i : order)
    if (!keep[i] && costs[adapter[i]] <= budget) take(i);
}

void mask_triplets_cpu_(at::TensorList lora_E, at::IntArrayRef ranks, const at::Tensor& kept,
                        const at::Tensor& progress) {
  check_triplet_mask(lora_E, ranks, kept, progress);
  if (progress_of(progress).budget < 0) return;
  const bool* keep = kept.const_data_ptr<bool>();
  for (size_t m = 0; m < ranks.size(); keep += ranks[m], ++m) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, lora_E[m].scalar_type(),
                                    "mask_triplets", [&] {
                                      auto* const e = lora_E[m].mutable_data_ptr<scalar_t>();
                                      const int64_t stride = lora_E[m].stride(0);
                                      for (int64_t i = 0; i < ranks[m]; ++i)
                                        if (!keep[i]) e[i * stride] = scalar_t(0);
                                    });
    lora_E[m].unsafeGetTensorImpl()->bump_version();  // a graph that saved it will say so
  }
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("_select_triplets_", &rankwise::select_triplets_cpu_);
  m.impl("_mask_triplets_", &rankwise::mask_triplets_cpu_);
}
