// A group's operands and results, as lists and as structures, and the checks of both.
#include "../layer_group.h"

#include "../checks.h"

namespace rankwise {
namespace {

std::string name_of(size_t layer) {
  return "lora_linear_group, layer " + std::to_string(layer);
}

// Whether `mask` asks for a layer's gradient of this index in LayerGradients, and there is one.
bool wanted(const GroupMask& mask, const GroupedLinear& layer, size_t index) {
  constexpr size_t index_of_E = 4;
  return mask[index + 1] && (index != index_of_E || has(layer.lora_E));
}

}  // namespace

c10::SymInt LayerGroup::offset(size_t of) const {
  c10::SymInt result = 0;
  for (size_t i = 0; i < of; ++i) result += *layers[i].rank;
  return result;
}

c10::SymInt LayerGroup::rank() const {
  return offset(size());
}

LayerGroup LayerGroup::of(const std::vector<size_t>& chosen) const {
  LayerGroup result{{}, dropout_p};
  for (const size_t i : chosen) result.layers.push_back(layers[i]);
  return result;
}

void check_group(const at::Tensor& input, const LayerGroup& group) {
  for (size_t i = 0; i < group.size(); ++i) {
    const std::string op = name_of(i);
    check_lora_linear(op.c_str(), input, group[i].weight, group[i].bias, group.adapter(i));
    TORCH_CHECK(group[i].lora_A.scalar_type() == group[0].lora_A.scalar_type(), op,
                ": lora_A must be ", group[0].lora_A.scalar_type(), " like layer 0's, got ",
                group[i].lora_A.scalar_type());
    check_dense(op.c_str(), "weight", group[i].weight);
  }
  check_dense("lora_linear_group", "input", input);
}

void check_group_backward(const std::vector<at::Tensor>& grad_outputs, const at::Tensor& input,
                          const LayerGroup& group, const at::Tensor& hidden,
                          const at::Tensor& seed) {
  check_group(input, group);
  TORCH_CHECK(grad_outputs.size() == group.size(),
              "lora_linear_group: grad_outputs must have one tensor for each of ", group.size(),
              " layers, got ", grad_outputs.size());
  for (size_t i = 0; i < group.size(); ++i) {
    check_backward(name_of(i).c_str(), grad_outputs[i], input, group.adapter(i),
                   hidden.narrow_symint(1, group.offset(i), *group[i].rank), seed);
  }
}

LayerGroup listed(at::TensorList weights, const OptionalTensors* biases, at::TensorList lora_A,
                  at::TensorList lora_B, const OptionalTensors& lora_E,
                  at::ArrayRef<double> scaling, double dropout_p,
                  at::OptionalSymIntArrayRef ranks) {
  const size_t count = weights.size();
  const auto check_length = [&](const char* name, size_t length) {
    TORCH_CHECK(length == count && count > 0, "lora_linear_group: ", name,
                " must have an element for each of at least one weight, got ", length,
                " elements and ", count, " weights");
  };
  check_length("lora_A", lora_A.size());
  check_length("lora_B", lora_B.size());
  check_length("lora_E", lora_E.size());
  check_length("scaling", scaling.size());
  if (biases != nullptr) check_length("biases", biases->size());
  if (ranks) check_length("ranks", ranks->size());
  LayerGroup group{{}, dropout_p};
  for (size_t i = 0; i < count; ++i) {
    std::optional<c10::SymInt> rank;
    if (ranks) rank = (*ranks)[i];
    group.layers.push_back(
        {weights[i], biases != nullptr ? biases->get(i) : std::nullopt, lora_A[i], lora_B[i],
         lora_E.get(i), scaling[i],
         active_rank(name_of(i).c_str(), lora_A[i], lora_A[i].sym_size(-1), rank)});
  }
  return group;
}

Tensors flat(const GroupForwardResult& result) {
  Tensors list = result.outputs;
  list.push_back(result.hidden);
  list.push_back(result.seed);
  return list;
}

GroupForwardResult forward_result(Tensors list) {
  GroupForwardResult result;
  result.seed = list.back();
  list.pop_back();
  result.hidden = list.back();
  list.pop_back();
  result.outputs = std::move(list);
  return result;
}

Tensors flat(const GroupGradients& gradients) {
  Tensors list;
  const auto put = [&](const at::Tensor& tensor) {
    if (tensor.defined()) list.push_back(tensor);
  };
  put(gradients.input);
  for (const LayerGradients& layer : gradients.layers)
    for (const at::Tensor& tensor : layer) put(tensor);
  return list;
}

GroupGradients gradients(const Tensors& list, const LayerGroup& group, const GroupMask& mask) {
  GroupGradients result;
  auto next = list.begin();
  if (mask[0]) result.input = *next++;
  for (const GroupedLinear& layer : group.layers) {
    LayerGradients& own = result.layers.emplace_back();
    for (size_t i = 0; i < own.size(); ++i)
      if (wanted(mask, layer, i)) own[i] = *next++;
  }
  return result;
}

}  // namespace rankwise
