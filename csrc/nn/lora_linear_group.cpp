// LoRALinearGroup: which layers one call can compute, and the call.
#include <rankwise/linear_group.h>
#include <rankwise/nn_linear_group.h>

#include <algorithm>
#include <stdexcept>

namespace rankwise::nn {
namespace {

// A layer's part of the call, and what all of them must have in common.
struct Member {
  GroupedLinear operands;
  double dropout;
  bool alone;  // computes its base alone

  template <class Layer>
  explicit Member(const Layer& layer)
      : dropout(layer->is_training() ? layer->settings().dropout : 0.0),
        alone(layer->merged() || !layer->adapter()) {
    operands.weight = layer->weight;
    if (layer->bias.defined()) operands.bias = layer->bias;
    operands.lora_A = layer->lora_A;
    operands.lora_B = layer->lora_B;
    if (layer->lora_E.defined()) operands.lora_E = layer->lora_E;
    operands.scaling = layer->scaling();
    operands.rank = layer->rank();
  }

  bool fits(const Member& other) const {
    return !alone && !other.alone && dropout == other.dropout &&
           operands.weight.scalar_type() == other.operands.weight.scalar_type() &&
           operands.weight.device() == other.operands.weight.device() &&
           operands.lora_A.scalar_type() == other.operands.lora_A.scalar_type();
  }
};

}  // namespace

LoRALinearGroup::LoRALinearGroup(std::vector<Layer> layers) : layers_(std::move(layers)) {
  if (layers_.empty()) throw std::invalid_argument("LoRALinearGroup: layers must not be empty");
  const auto in_features = [](const Layer& layer) {
    return std::visit([](const auto& of) { return of->weight.size(1); }, layer);
  };
  for (const Layer& layer : layers_) {
    if (in_features(layer) == in_features(layers_[0])) continue;
    throw std::invalid_argument(c10::str("LoRALinearGroup: layers must have one in_features, got ",
                                         in_features(layers_[0]), " and ", in_features(layer)));
  }
}

std::vector<at::Tensor> LoRALinearGroup::operator()(const at::Tensor& input) const {
  std::vector<Member> members;
  for (const Layer& layer : layers_)
    members.push_back(std::visit([](const auto& of) { return Member(of); }, layer));
  const bool as_one = !input.is_nested() &&
                      std::all_of(members.begin(), members.end(),
                                  [&](const Member& member) { return member.fits(members[0]); });
  std::vector<at::Tensor> outputs;
  if (!as_one) {
    for (const Layer& layer : layers_)
      outputs.push_back(std::visit([&](auto of) { return of->forward(input); }, layer));
    return outputs;
  }
  std::vector<GroupedLinear> operands;
  for (const Member& member : members) operands.push_back(member.operands);
  return lora_linear_group(input, operands, members[0].dropout);
}

}  // namespace rankwise::nn
