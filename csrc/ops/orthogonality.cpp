// The orthogonality penalty: one autograd node over all factors, its gradient in closed form.
//
//   D = F F^T - I for the rows F = A or B^T;   d||D||^2/dF = 4 D F,   d||D||/dF = 2 D F / ||D||
#include "orthogonality.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/functorch/DynamicLayer.h>
#include <rankwise/ops.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/blocks.h"
#include "find_op.h"

namespace rankwise {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// One factor: A of adapter i, or B of adapter i - count.
struct Factor {
  at::Tensor tensor;
  int64_t dim;  // along which its directions lie
  int64_t rank;

  Factor(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks, size_t i)
      : tensor(i < ranks.size() ? lora_A[i] : lora_B[i - ranks.size()]),
        dim(i < ranks.size() ? 0 : 1),
        rank(ranks[i % ranks.size()]) {}

  // The active directions as rows, wide enough to be summed.
  at::Tensor rows() const {
    const at::Tensor active = tensor.narrow(dim, 0, rank);
    const bool narrow = active.element_size() < 4;
    const at::Tensor wide = narrow ? active.to(at::kFloat) : active;
    return dim == 0 ? wide : wide.t();
  }
};

at::Tensor deviation(const at::Tensor& rows) {
  return at::mm(rows, rows.t()) - at::eye(rows.size(0), rows.options());
}

at::Tensor term(const Factor& factor, bool squared) {
  const at::Tensor d = deviation(factor.rows());
  return squared ? d.square().sum() : at::linalg_vector_norm(d);
}

// The gradient of a factor's term, times `scale`, in the factor's own shape and dtype.
at::Tensor term_gradient(const Factor& factor, bool squared, const at::Tensor& scale) {
  const at::Tensor rows = factor.rows();
  const at::Tensor d = deviation(rows);
  at::Tensor weight = scale * 4;
  if (!squared) {
    const at::Tensor norm = at::linalg_vector_norm(d);
    weight = scale * 2 / at::where(norm == 0, at::ones_like(norm), norm);  // 0 where D is 0
  }
  const at::Tensor gradient = at::mm(d * weight, rows).to(factor.tensor.scalar_type());
  const at::Tensor oriented = factor.dim == 0 ? gradient : gradient.t();
  const int64_t inactive = factor.tensor.size(factor.dim) - factor.rank;
  if (inactive == 0) return oriented.contiguous();
  std::vector<int64_t> size = factor.tensor.sizes().vec();
  size[factor.dim] = inactive;
  return at::cat({oriented, at::zeros(size, oriented.options())}, factor.dim);
}

// One after the other, recorded where somebody records: the specification.
void one_by_one(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

// `loop` is run_blocks on the CPU, where each factor is summed by one thread, so that every number
// of threads gives the same bits, and one_by_one elsewhere.
template <auto loop>
at::Tensor penalty(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks,
                   bool squared) {
  check_orthogonality(lora_A, lora_B, ranks);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::vector<at::Tensor> terms(2 * ranks.size());
  loop(static_cast<int64_t>(terms.size()),
       [&](int64_t i) { terms[i] = term(Factor(lora_A, lora_B, ranks, i), squared); });
  const at::Tensor all = at::stack(terms);
  return squared ? all.sum() : all.mean();
}

template <auto loop>
std::vector<at::Tensor> penalty_backward(const at::Tensor& grad_output, at::TensorList lora_A,
                                         at::TensorList lora_B, at::IntArrayRef ranks,
                                         bool squared) {
  check_orthogonality(lora_A, lora_B, ranks);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::vector<at::Tensor> gradients(2 * ranks.size());
  const double share = squared ? 1.0 : 1.0 / static_cast<double>(gradients.size());
  const at::Tensor scale = grad_output * share;
  loop(static_cast<int64_t>(gradients.size()), [&](int64_t i) {
    gradients[i] = term_gradient(Factor(lora_A, lora_B, ranks, i), squared, scale);
  });
  return gradients;
}

using PenaltySignature = at::Tensor(at::TensorList, at::TensorList, at::IntArrayRef, bool);
using BackwardSignature = std::vector<at::Tensor>(const at::Tensor&, at::TensorList, at::TensorList,
                                                  at::IntArrayRef, bool);

at::Tensor call_penalty(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks,
                        bool squared) {
  static const auto op = find_op<PenaltySignature>("rankwise::orthogonality_penalty");
  return op.call(lora_A, lora_B, ranks, squared);
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
    return call_penalty(lora_A, lora_B, ranks, squared);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_op<BackwardSignature>("rankwise::_orthogonality_backward");
    const variable_list factors = ctx->get_saved_variables();
    const at::TensorList all(factors);
    const std::vector<int64_t> ranks = ctx->saved_data["ranks"].toIntVector();
    variable_list gradients =
        op.call(grad_outputs[0], all.slice(0, ranks.size()), all.slice(ranks.size()), ranks,
                ctx->saved_data["squared"].toBool());
    gradients.resize(factors.size() + 2);
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
    return penalty<one_by_one>(lora_A, lora_B, ranks, squared);
  }
  return OrthogonalityFunction::apply(lora_A, lora_B, ranks.vec(), squared);
}

// Double backward: the gradients as a differentiable formula when somebody records them.
std::vector<at::Tensor> backward_autograd(const at::Tensor& grad_output, at::TensorList lora_A,
                                          at::TensorList lora_B, at::IntArrayRef ranks,
                                          bool squared) {
  const auto required = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  if (at::GradMode::is_enabled() &&
      (grad_output.requires_grad() || std::any_of(lora_A.begin(), lora_A.end(), required) ||
       std::any_of(lora_B.begin(), lora_B.end(), required))) {
    return penalty_backward<one_by_one>(grad_output, lora_A, lora_B, ranks, squared);
  }
  static const auto op = find_op<BackwardSignature>("rankwise::_orthogonality_backward");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(grad_output, lora_A, lora_B, ranks, squared);
}

}  // namespace

void check_orthogonality(at::TensorList lora_A, at::TensorList lora_B, at::IntArrayRef ranks) {
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

at::Tensor orthogonality_penalty_composite(at::TensorList lora_A, at::TensorList lora_B,
                                           at::IntArrayRef ranks, bool squared) {
  return penalty<one_by_one>(lora_A, lora_B, ranks, squared);
}

std::vector<at::Tensor> orthogonality_backward_composite(const at::Tensor& grad_output,
                                                         at::TensorList lora_A,
                                                         at::TensorList lora_B,
                                                         at::IntArrayRef ranks, bool squared) {
  return penalty_backward<one_by_one>(grad_output, lora_A, lora_B, ranks, squared);
}

at::Tensor orthogonality_penalty(at::TensorList lora_A, at::TensorList lora_B,
                                 OrthogonalityForm form,
                                 std::optional<std::vector<int64_t>> ranks) {
  if (!ranks) {
    ranks.emplace();
    for (const at::Tensor& A : lora_A) ranks->push_back(A.size(0));
  }
  return call_penalty(lora_A, lora_B, *ranks, form == OrthogonalityForm::squared_sum);
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CPU, m) {
  m.impl("orthogonality_penalty", &rankwise::penalty<rankwise::run_blocks>);
  m.impl("_orthogonality_backward", &rankwise::penalty_backward<rankwise::run_blocks>);
}

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("orthogonality_penalty", &rankwise::orthogonality_penalty_composite);
  m.impl("_orthogonality_backward", &rankwise::orthogonality_backward_composite);
}

TORCH_LIBRARY_IMPL(rankwise, Autograd, m) {
  m.impl("orthogonality_penalty", &rankwise::penalty_autograd);
  m.impl("_orthogonality_backward", &rankwise::backward_autograd);
}

TORCH_LIBRARY_IMPL(rankwise, FuncTorchBatchedDecomposition, m) {
  m.impl("orthogonality_penalty", &rankwise::penalty_autograd);
}
