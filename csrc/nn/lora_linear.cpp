// LoRALinear and AdaLoRALinear: construction, first values, forward.
#include <rankwise/nn.h>
#include <rankwise/ops.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>
#include <type_traits>

namespace rankwise::nn {
namespace {

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

}  // namespace

template <class Derived>
AdaptedLinear<Derived>::AdaptedLinear(const LoRALinearOptions& options, bool triplets) {
  this->weight = torch::empty({options.out_features(), options.in_features()});
  if (options.bias()) bias = torch::empty({options.out_features()});
  this->adapt(options.settings(), triplets);
  this->register_tensors();
  reset_parameters();
}

template <class Derived>
AdaptedLinear<Derived>::AdaptedLinear(const torch::nn::Linear& linear,
                                      const AdapterOptions& options, bool triplets)
    : bias(linear->bias) {
  this->weight = linear->weight;
  this->adapt(options.settings(), triplets);
  if (bias.defined()) bias.requires_grad_(false);
  this->register_tensors();
  this->train(linear->is_training());
  this->reset_adapter();
}

template <class Derived>
std::vector<std::pair<const char*, at::Tensor*>> AdaptedLinear<Derived>::tensors() {
  auto all = AdaptedModule<Derived>::tensors();
  all.insert(all.begin() + 1, {"bias", &bias});
  return all;
}

template <class Derived>
void AdaptedLinear<Derived>::reset_parameters() {
  this->check_unmerged("reset_parameters");
  torch::nn::init::kaiming_uniform_(this->weight, std::sqrt(5.0));  // as torch::nn::Linear
  if (bias.defined()) {
    const double bound = 1 / std::sqrt(static_cast<double>(this->weight.size(1)));
    torch::nn::init::uniform_(bias, -bound, bound);
  }
  this->reset_adapter();
}

template <class Derived>
at::Tensor AdaptedLinear<Derived>::adapted(const at::Tensor& input) {
  this->check_trainable(this->is_training());
  if (this->merged() || !this->adapter()) return at::linear(input, this->weight, if_defined(bias));
  return lora_linear(input, this->weight, if_defined(bias), this->lora_A, this->lora_B,
                     if_defined(this->lora_E), this->scaling(),
                     this->is_training() ? this->settings().dropout : 0.0, this->rank());
}

template <class Derived>
void AdaptedLinear<Derived>::pretty_print(std::ostream& stream) const {
  stream << "rankwise::nn::"
         << (std::is_same_v<Derived, AdaLoRALinearImpl> ? "AdaLoRALinear" : "LoRALinear")
         << std::boolalpha << "(in_features=" << this->weight.size(1)
         << ", out_features=" << this->weight.size(0) << ", bias=" << bias.defined() << ", ";
  this->print_adapter(stream);
  stream << ")";
}

template class AdaptedLinear<LoRALinearImpl>;
template class AdaptedLinear<AdaLoRALinearImpl>;

}  // namespace rankwise::nn
