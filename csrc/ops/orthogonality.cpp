// The orthogonality penalty: one autograd node over all factors, its gradient in closed form.
//
//   D = F F^T - I for the rows F = A or B^T;   d||D||^2/dF = 4 D F,   d||D||/dF = 2 D F / ||D||
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/functorch/DynamicLayer.h>
#include <rankwise/ops.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "find_op.h"

namespace rankwise {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The active directions as rows, wide enough to be summed.
at::Tensor rows_of(const at::Tensor& factor, int64_t dim, int64_t rank) {
  const at::Tensor active = factor.narrow(dim, 0, rank);
  const at::Tensor wide = active.to(active.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return dim == 0 ? wide : wide.t();
}

at::Tensor deviation(const at::Tensor& rows) {
  return at::mm(rows, rows.t()) - at::eye(rows.size(0), rows.options());
}

void check(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks) {
  const size_t count = lora_A.size();
  TORCH_CHECK(
      count > 0 && lora_B.size() == count && ranks.size() == count,
      "orthogonality_penalty: lora_A, lora_B and ranks must be lists of one length > 0, got ",
      count, ", ", lora_B.size(), " and ", ranks.size());
  for (size_t m = 0; m < count; ++m) {
    const bool shapes =
        lora_A[m].dim() == 2 && lora_B[m].dim() == 2 && lora_A[m].size(0) == lora_B[m].size(1);
    TORCH_CHECK(shapes, "orthogonality_penalty: lora_A[", m, "] must be [capacity, in] and lora_B[",
                m, "] [out, capacity], got ", lora_A[m].sizes(), " and ", lora_B[m].sizes());
    TORCH_CHECK(at::isFloatingType(lora_A[m].scalar_type()) &&
                    lora_A[m].scalar_type() == lora_B[m].scalar_type() &&
                    lora_A[m].scalar_type() == lora_A[0].scalar_type(),
                "orthogonality_penalty: all factors must have one floating-point dtype, got ",
                lora_A[0].scalar_type(), ", ", lora_A[m].scalar_type(), " and ",
                lora_B[m].scalar_type());
    TORCH_CHECK(ranks[m] >= 0 && ranks[m] <= lora_A[m].size(0), "orthogonality_penalty: ranks[", m,
                "] must be in [0, ", lora_A[m].size(0), "], got ", ranks[m]);
  }
}

at::Tensor penalty(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks,
                   bool squared) {
  check(lora_A, lora_B, ranks);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::vector<at::Tensor> terms;
  for (size_t m = 0; m < lora_A.size(); ++m) {
    for (const auto& [factor, dim] : {std::pair(lora_A[m], 0), std::pair(lora_B[m], 1)}) {
      const at::Tensor d = deviation(rows_of(factor, dim, ranks[m]));
      terms.push_back(squared ? d.square().sum() : at::linalg_vector_norm(d));
    }
  }
  const at::Tensor all = at::stack(terms);
  return squared ? all.sum() : all.mean();
}

// The gradient of one factor's term, times `scale`, in the factor's own shape and dtype.
at::Tensor term_gradient(const at::Tensor& factor, int64_t dim, int64_t rank, bool squared,
                         const at::Tensor& scale) {
  const at::Tensor rows = rows_of(factor, dim, rank);
  const at::Tensor d = deviation(rows);
  at::Tensor weight = scale * 4;
  if (!squared) {
    const at::Tensor norm = at::linalg_vector_norm(d);
    weight = scale * 2 / at::where(norm == 0, at::ones_like(norm), norm);  // 0 where D is 0
  }
  const at::Tensor gradient = at::mm(d * weight, rows).to(factor.scalar_type());
  const at::Tensor oriented = dim == 0 ? gradient : gradient.t();
  const int64_t inactive = factor.size(dim) - rank;
  if (inactive == 0) return oriented.contiguous();
  std::vector<int64_t> size = factor.sizes().vec();
  size[dim] = inactive;
  return at::cat({oriented, at::zeros(size, oriented.options())}, dim);
}

class OrthogonalityFunction : public torch::autograd::Function<OrthogonalityFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, at::TensorList lora_A, at::TensorList lora_B,
                            const std::vector<int64_t>& ranks, bool squared) {
    variable_list saved = lora_A.vec();
    saved.insert(saved.end(), lora_B.begin(), lora_B.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["ranks"] = ranks;
    ctx->saved_data["squared"] = squared;
    const at::AutoDispatchBelowADInplaceOrView guard;
    return penalty(lora_A, lora_B, ranks, squared);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const variable_list factors = ctx->get_saved_variables();
    const std::vector<int64_t> ranks = ctx->saved_data["ranks"].toIntVector();
    const bool squared = ctx->saved_data["squared"].toBool();
    const double share = squared ? 1.0 : 1.0 / static_cast<double>(factors.size());
    const at::Tensor scale = grad_outputs[0] * share;
    variable_list gradients(factors.size() + 2);
    for (size_t i = 0; i < factors.size(); ++i) {
      const size_t m = i % ranks.size();
      if (!ctx->needs_input_grad(i)) continue;
      gradients[i] = term_gradient(factors[i], i < ranks.size() ? 0 : 1, ranks[m], squared, scale);
    }
    return gradients;
  }
};

at::Tensor penalty_autograd(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks,
                            bool squared) {
  const auto has_tangent = [](const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); };
  // A C++ autograd node knows neither functorch's levels nor tangents; ATen's ops do.
  if (at::functorch::maybeCurrentDynamicLayer().has_value() ||
      std::any_of(lora_A.begin(), lora_A.end(), has_tangent) ||
      std::any_of(lora_B.begin(), lora_B.end(), has_tangent)) {
    return penalty(lora_A, lora_B, ranks, squared);
  }
  return OrthogonalityFunction::apply(lora_A, lora_B, ranks.vec(), squared);
}

}  // namespace

at::Tensor orthogonality_penalty(at::TensorList lora_A, at::TensorList lora_B,
                                 OrthogonalityForm form,
                                 std::optional<std::vector<int64_t>> ranks) {
  static const auto op = find_op<at::Tensor(at::TensorList, at::TensorList, at::IntArrayRef, bool)>(
      "rankwise::orthogonality_penalty");
  if (!ranks) {
    ranks.emplace();
    for (const at::Tensor& A : lora_A) ranks->push_back(A.size(0));
  }
  return op.call(lora_A, lora_B, *ranks, form == OrthogonalityForm::squared_sum);
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("orthogonality_penalty", &rankwise::penalty);
}

TORCH_LIBRARY_IMPL(rankwise, Autograd, m) {
  m.impl("orthogonality_penalty", &rankwise::penalty_autograd);
}

TORCH_LIBRARY_IMPL(rankwise, FuncTorchBatchedDecomposition, m) {
  m.impl("orthogonality_penalty", &rankwise::penalty_autograd);
}
