// lora_linear_group on CUDA: x is read once for all layers' A, forward and backward, and its
// gradient is accumulated product by product. Where the layers' ranks together are more than a
// kernel takes, x is read for each layer.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "../../kernels/lora_linear.h"
#include "../checks.h"
#include "../dropout.h"
#include "../layer_group.h"
#include "../matrices.h"
#include "adapter.h"
#include "base_product.h"
#include "layer_products.h"
#include "term_product.h"

namespace rankwise {
namespace {

bool kernels_serve(const at::Tensor& input, const LayerGroup& group) {
  return std::all_of(group.layers.begin(), group.layers.end(), [&](const GroupedLinear& layer) {
    return rankwise::kernels_serve(input, layer.weight, layer.rank->guard_int(__FILE__, __LINE__));
  });
}

std::vector<int64_t> ranks_of(const LayerGroup& group) {
  std::vector<int64_t> ranks;
  for (const GroupedLinear& layer : group.layers)
    ranks.push_back(layer.rank->guard_int(__FILE__, __LINE__));
  return ranks;
}

// All layers' A as one factor of so many directions, without a B: x's side of the group.
struct SharedSide {
  at::Tensor A, no_B;
  CudaAdapter adapter;

  SharedSide(const LayerGroup& group, const at::Tensor& seed)
      : A(stacked(group)),
        no_B(at::empty({0, A.size(0)}, A.options())),
        adapter({A, no_B, std::nullopt, 1.0, group.dropout_p, A.size(0)}, seed) {}

  static bool serves(const LayerGroup& group) { return group.rank() <= kernels::max_rank; }

  static at::Tensor stacked(const LayerGroup& group) {
    std::vector<at::Tensor> factors;
    for (const GroupedLinear& layer : group.layers)
      factors.push_back(layer.lora_A.narrow_symint(0, 0, *layer.rank));
    return at::cat(factors);
  }
};

// drop(x) A^T of each layer.
std::vector<at::Tensor> project(const LayerGroup& group, const at::Tensor& x,
                                const at::Tensor& seed) {
  std::vector<at::Tensor> result;
  if (!SharedSide::serves(group)) {
    for (size_t i = 0; i < group.size(); ++i) {
      const CudaAdapter adapter(group.adapter(i), seed);
      result.push_back(at::empty({x.size(0), adapter.rank()}, adapter.A.options()));
      if (adapter.rank() > 0) shrink(adapter, x, result.back(), result.back());
    }
    return result;
  }
  const SharedSide shared(group, seed);
  const at::Tensor hidden = at::empty({x.size(0), shared.adapter.rank()}, shared.A.options());
  if (shared.adapter.rank() > 0) shrink(shared.adapter, x, hidden, hidden);
  for (const at::Tensor& own : hidden.split_with_sizes(ranks_of(group), 1))
    result.push_back(own.contiguous());
  return result;
}

at::Tensor output_of(const CudaAdapter& adapter, const at::Tensor& x, const GroupedLinear& layer,
                     at::Tensor gated) {
  if (adapter.E.defined()) gated = gated * adapter.E;
  const ProductTerm term = output_term(adapter, x, layer.weight);
  if (!term.defined()) return add_output(adapter, x, layer.weight, layer.bias, gated);
  write(term, gated * adapter.scaling);
  return product_with_term(x, layer.weight.t(), term, layer.bias);
}

GroupForwardResult group_forward_cuda(const at::Tensor& input, const LayerGroup& group) {
  check_group(input, group);
  const c10::cuda::CUDAGuard guard(input.device());
  if (!kernels_serve(input, group)) return lora_linear_group_forward_composite(input, group);
  const at::Tensor seed = Dropout(group.dropout_p).draw_seed(input), x = matrix(input);
  const std::vector<at::Tensor> hidden = project(group, x, seed);
  GroupForwardResult result{{}, at::cat(hidden, 1), seed};
  std::vector<int64_t> shape = input.sizes().vec();
  for (size_t i = 0; i < group.size(); ++i) {
    const CudaAdapter adapter(group.adapter(i), seed);
    const at::Tensor y = output_of(adapter, x, group[i], hidden[i]);
    shape.back() = y.size(1);
    result.outputs.push_back(y.view(shape));
  }
  return result;
}

// Each layer by itself, from the group's hidden and seed.
GroupGradients layer_by_layer(const std::vector<at::Tensor>& grad_outputs, const at::Tensor& input,
                              const LayerGroup& group, const std::vector<at::Tensor>& hidden,
                              const at::Tensor& seed, const GroupMask& output_mask) {
  GroupGradients result;
  for (size_t i = 0; i < group.size(); ++i) {
    GroupMask mask = output_mask;
    mask[5] = mask[5] && has(group[i].lora_E);
    auto [dx, dw, db, dA, dB, dE] =
        lora_linear_backward(grad_outputs[i], input, group[i].weight, group.adapter(i),
                             hidden[i].contiguous(), seed, mask);
    result.layers.push_back({dw, db, dA, dB, dE});
    if (mask[0]) result.input = i == 0 ? dx : result.input.add_(dx);
  }
  return result;
}

// The gradients of all A from dh of all, [tokens, rank].
void add_input_factors(const LayerGroup& group, const SharedSide& shared, const at::Tensor& x,
                       const at::Tensor& dh, GroupGradients& to) {
  const at::Tensor dA = at::empty(shared.A.sizes(), shared.A.options());
  if (shared.adapter.rank() > 0) input_factor_gradient(shared.adapter, x, dh, dA);
  const std::vector<int64_t> ranks = ranks_of(group);
  const std::vector<at::Tensor> own = dA.split_with_sizes(ranks, 0);
  for (size_t i = 0; i < group.size(); ++i) {
    const int64_t capacity = group[i].lora_A.size(0);
    at::Tensor& whole = to.layers[i][2];
    whole = gradient_of(group[i].lora_A, capacity, ranks[i]);
    whole.narrow(0, 0, ranks[i]).copy_(own[i]);
  }
}

GroupGradients group_backward_cuda(const std::vector<at::Tensor>& grad_outputs,
                                   const at::Tensor& input, const LayerGroup& group,
                                   const at::Tensor& hidden, const at::Tensor& seed,
                                   const GroupMask& output_mask) {
  check_group_backward(grad_outputs, input, group, hidden, seed);
  const c10::cuda::CUDAGuard guard(input.device());
  if (!kernels_serve(input, group)) {
    return lora_linear_group_backward_composite(grad_outputs, input, group, hidden, seed,
                                                output_mask);
  }
  const std::vector<at::Tensor> parts = hidden.split_with_sizes(ranks_of(group), 1);
  if (!SharedSide::serves(group))
    return layer_by_layer(grad_outputs, input, group, parts, seed, output_mask);
  const auto [need_x, need_w, need_b, need_A, need_B, need_E] = output_mask;
  const at::Tensor x = matrix(input);
  GroupGradients result;
  std::vector<at::Tensor> dy, dh;
  for (size_t i = 0; i < group.size(); ++i) {
    dy.push_back(matrix(grad_outputs[i]));
    const AdapterOperands operands = group.adapter(i);
    const ParameterGradients d =
        parameter_gradients(CudaAdapter(operands, seed), operands, dy[i], input, parts[i],
                            {need_x || need_A, false, need_B, need_E && has(group[i].lora_E)});
    if (need_x || need_A) dh.push_back(d.dh);
    const at::Tensor dw = need_w ? at::mm(dy[i].t(), x) : at::Tensor();
    const at::Tensor db = need_b ? at::sum(dy[i], 0) : at::Tensor();
    result.layers.push_back({dw, db, at::Tensor(), d.B, d.E});
  }
  if (!need_x && !need_A) return result;
  const SharedSide shared(group, seed);
  const at::Tensor dh_of_all = at::cat(dh, 1);
  if (need_A) add_input_factors(group, shared, x, dh_of_all, result);
  if (!need_x) return result;
  const ProductTerm term = input_term(shared.adapter, dy[0], group[0].weight, {});
  if (term.defined()) write(term, dh_of_all);
  const at::Tensor dx = input_gradient(shared.adapter, dy[0], group[0].weight, dh_of_all, term);
  for (size_t i = 1; i < group.size(); ++i) add_base(dx, dy[i], group[i].weight);
  result.input = dx.view(input.sizes());
  return result;
}

}  // namespace
}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_lora_linear_group_forward", &rankwise::group_forward<rankwise::group_forward_cuda>);
  m.impl("_lora_linear_group_backward", &rankwise::group_backward<rankwise::group_backward_cuda>);
}
