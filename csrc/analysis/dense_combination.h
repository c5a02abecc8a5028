// Combinations that are defined on the elements of updates.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/analysis.h>

#include <vector>

#include "factors.h"

namespace rankwise::analysis {

// The combination [out, in] of updates of one shape; never linear's. One update is dense at a time.
at::Tensor dense_combination(const std::vector<Factors>& updates,
                             const std::vector<double>& weights, const CombineOptions& options);

}  // namespace rankwise::analysis
