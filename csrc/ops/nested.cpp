// lora_linear and lora_embedding of nested tensors (strided layout; jagged ones are a Python
// class): the plain op over the rows of all components at once, and its result cut into components
// again.
#include <ATen/ATen.h>
#include <rankwise/ops.h>
#include <torch/library.h>

#include <functional>

#include "checks.h"

namespace rankwise {
namespace {

using Op = std::function<at::Tensor(const at::Tensor&)>;

// `row_dims`: of a component, the last dimensions that are a row of it.
at::Tensor over_components(const char* op, const char* name, const at::Tensor& nested,
                           int64_t row_dims, const Op& over_rows) {
  TORCH_CHECK(nested.layout() == at::kStrided, op, ": ", name,
              " must be dense or a nested tensor of strided layout, got a nested one of layout ",
              nested.layout(), "; call the op on its values(), as rankwise.ops does");
  const std::vector<at::Tensor> components = nested.unbind();
  TORCH_CHECK(!components.empty(), op, ": ", name, " must have a component, got none");
  std::vector<at::Tensor> rows;
  std::vector<int64_t> counts;
  for (const at::Tensor& component : components) {
    const auto row = component.sizes().slice(component.dim() - row_dims);
    TORCH_CHECK(row_dims == 0 || row[0] == components[0].size(-1), op, ": ", name,
                " must have one last size in all components, got ", components[0].size(-1), " and ",
                row[0]);
    counts.push_back(row_dims == 0 ? component.numel() : token_count(component));
    std::vector<int64_t> sizes = {counts.back()};
    sizes.insert(sizes.end(), row.begin(), row.end());
    rows.push_back(component.reshape(sizes));
  }
  std::vector<at::Tensor> results = over_rows(at::cat(rows)).split_with_sizes(counts);
  for (size_t i = 0; i < components.size(); ++i) {
    std::vector<int64_t> sizes = components[i].sizes().vec();
    sizes.resize(sizes.size() - row_dims);
    sizes.push_back(results[i].size(-1));
    results[i] = results[i].reshape(sizes);
  }
  return at::_nested_tensor_from_tensor_list(results);
}

at::Tensor lora_linear_nested(const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, const at::Tensor& lora_A,
                              const at::Tensor& lora_B, const std::optional<at::Tensor>& lora_E,
                              double scaling, double dropout_p, std::optional<c10::SymInt> rank) {
  check_dense("lora_linear", "weight", weight);
  if (has(bias)) check_dense("lora_linear", "bias", *bias);
  check_dense_factors("lora_linear", lora_A, lora_B, lora_E);
  std::optional<int64_t> directions;
  if (rank) directions = rank->guard_int(__FILE__, __LINE__);
  return over_components("lora_linear", "input", input, /*row_dims=*/1, [&](const at::Tensor& x) {
    return lora_linear(x, weight, bias, lora_A, lora_B, lora_E, scaling, dropout_p, directions);
  });
}

at::Tensor lora_embedding_nested(const at::Tensor& indices, const at::Tensor& weight,
                                 const at::Tensor& lora_A, const at::Tensor& lora_B,
                                 const std::optional<at::Tensor>& lora_E, double scaling,
                                 int64_t padding_idx, std::optional<c10::SymInt> rank) {
  check_dense("lora_embedding", "weight", weight);
  check_dense_factors("lora_embedding", lora_A, lora_B, lora_E);
  std::optional<int64_t> directions;
  if (rank) directions = rank->guard_int(__FILE__, __LINE__);
  return over_components(
      "lora_embedding", "indices", indices, /*row_dims=*/0, [&](const at::Tensor& i) {
        return lora_embedding(i, weight, lora_A, lora_B, lora_E, scaling, padding_idx, directions);
      });
}

void register_nested(torch::Library& m) {
  m.impl("lora_linear", &lora_linear_nested);
  m.impl("lora_embedding", &lora_embedding_nested);
}

}  // namespace
}  // namespace rankwise

// Autograd follows the ATen ops around the plain one, so with and without it the code is the same.
TORCH_LIBRARY_IMPL(rankwise, AutogradNestedTensor, m) {
  rankwise::register_nested(m);
}
TORCH_LIBRARY_IMPL(rankwise, NestedTensorCPU, m) {
  rankwise::register_nested(m);
}
TORCH_LIBRARY_IMPL(rankwise, NestedTensorCUDA, m) {
  rankwise::register_nested(m);
}
