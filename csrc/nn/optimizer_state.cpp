// optimizer_state and ReadOptimizer: the fields of torch's classes, named once for both ways.
#include "optimizer_state.h"

#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <torch/optim.h>

#include <concepts>
#include <set>
#include <stdexcept>
#include <tuple>

namespace rankwise {
namespace {

using namespace torch::optim;

template <class Own, class... Classes>
concept one_of = (std::same_as<std::remove_const_t<Own>, Classes> || ...);

// visit(name, field) for the fields of each class; of a state's tensors also whether it must be
// there.
template <class Visit, one_of<AdamWOptions, AdamOptions> Own>
void fields(Own& own, Visit& visit) {
  visit("lr", own.lr());
  visit("betas", own.betas());
  visit("eps", own.eps());
  visit("weight_decay", own.weight_decay());
  visit("amsgrad", own.amsgrad());
}

template <class Visit, one_of<AdamWParamState, AdamParamState> Own>
void fields(Own& own, Visit& visit) {
  visit("step", own.step());
  visit("exp_avg", own.exp_avg(), true);
  visit("exp_avg_sq", own.exp_avg_sq(), true);
  visit("max_exp_avg_sq", own.max_exp_avg_sq(), false);
}

template <class Visit, one_of<SGDOptions> Own>
void fields(Own& own, Visit& visit) {
  visit("lr", own.lr());
  visit("momentum", own.momentum());
  visit("dampening", own.dampening());
  visit("weight_decay", own.weight_decay());
  visit("nesterov", own.nesterov());
}

template <class Visit, one_of<SGDParamState> Own>
void fields(Own& own, Visit& visit) {
  visit("momentum_buffer", own.momentum_buffer(), true);
}

template <class Visit, one_of<RMSpropOptions> Own>
void fields(Own& own, Visit& visit) {
  visit("lr", own.lr());
  visit("alpha", own.alpha());
  visit("eps", own.eps());
  visit("weight_decay", own.weight_decay());
  visit("momentum", own.momentum());
  visit("centered", own.centered());
}

template <class Visit, one_of<RMSpropParamState> Own>
void fields(Own& own, Visit& visit) {
  visit("step", own.step());
  visit("square_avg", own.square_avg(), true);
  visit("momentum_buffer", own.momentum_buffer(), false);
  visit("grad_avg", own.grad_avg(), false);
}

template <class Visit, one_of<AdagradOptions> Own>
void fields(Own& own, Visit& visit) {
  visit("lr", own.lr());
  visit("lr_decay", own.lr_decay());
  visit("weight_decay", own.weight_decay());
  visit("initial_accumulator_value", own.initial_accumulator_value());
  visit("eps", own.eps());
}

template <class Visit, one_of<AdagradParamState> Own>
void fields(Own& own, Visit& visit) {
  visit("step", own.step());
  visit("sum", own.sum(), true);
}

template <class O, class S>
struct Classes {
  using Options = O;
  using State = S;
  const char* name;
};

// body(classes) of the optimizer that has these options.
template <class Body>
void with_classes(const OptimizerOptions& options, const Body& body) {
  const auto are = [&]<class O, class S>(const Classes<O, S>& classes) {
    const bool own = dynamic_cast<const O*>(&options) != nullptr;
    if (own) body(classes);
    return own;
  };
  const bool known = are(Classes<AdamWOptions, AdamWParamState>{"AdamW"}) ||
                     are(Classes<AdamOptions, AdamParamState>{"Adam"}) ||
                     are(Classes<SGDOptions, SGDParamState>{"SGD"}) ||
                     are(Classes<RMSpropOptions, RMSpropParamState>{"RMSprop"}) ||
                     are(Classes<AdagradOptions, AdagradParamState>{"Adagrad"});
  if (!known)
    throw std::invalid_argument(
        "optimizer must be torch::optim's AdamW, Adam, SGD, RMSprop or Adagrad, got one with " +
        c10::demangle(typeid(options).name()));
}

// A field's name in the state.
struct Place {
  std::string before, after;
  std::string operator()(const char* field) const { return before + field + after; }
};

Place in_group(size_t group) {
  return {"group." + std::to_string(group) + ".", ""};
}
Place in_state(const std::string& parameter) {
  return {"state.", "." + parameter};
}

at::Tensor tensor_of(const std::tuple<double, double>& pair) {
  return at::tensor({std::get<0>(pair), std::get<1>(pair)}, at::kDouble);
}
template <class Number>
at::Tensor tensor_of(Number number) {
  return at::scalar_tensor(number, c10::CppTypeToScalarType<Number>::value);
}

struct Write {
  NamedTensors& into;
  const Place place;

  void operator()(const char* field, const at::Tensor& tensor, bool /*needed*/) {
    if (tensor.defined()) into[place(field)] = tensor;
  }
  void operator()(const char* field, const auto& value) { into[place(field)] = tensor_of(value); }
};

// Takes fields out of `from`.
struct Read {
  NamedTensors& from;
  Faults& faults;
  const Place place;
  const at::Tensor like;  // of a parameter's state: the parameter

  void operator()(const char* field, at::Tensor& tensor, bool needed) {
    const std::string name = place(field);
    const auto found = from.extract(name);
    if (found.empty()) {
      if (needed) faults.push_back("optimizer." + name + ": missing in the checkpoint");
    } else if (found.mapped().sizes() != like.sizes()) {
      faults.push_back(c10::str("optimizer.", name, ": must have the parameter's shape ",
                                like.sizes(), ", got ", found.mapped().sizes()));
    } else {
      tensor = found.mapped().to(like.device());
    }
  }
  void operator()(const char* field, double& value) { number(field, value); }
  void operator()(const char* field, int64_t& value) { number(field, value); }
  void operator()(const char* field, bool& value) { number(field, value); }
  void operator()(const char* field, std::tuple<double, double>& pair) {
    if (const auto found = taken(field, tensor_of(pair)); found.defined())
      pair = {found[0].item<double>(), found[1].item<double>()};
  }

 private:
  template <class Number>
  void number(const char* field, Number& value) {
    if (const auto found = taken(field, tensor_of(value)); found.defined())
      value = found.template item<Number>();
  }
  at::Tensor taken(const char* field, const at::Tensor& wanted) {
    const std::string name = place(field);
    const auto found = from.extract(name);
    if (!found.empty() && found.mapped().scalar_type() == wanted.scalar_type() &&
        found.mapped().sizes() == wanted.sizes())
      return found.mapped();
    faults.push_back(c10::str("optimizer.", name, ": must be ", wanted.scalar_type(), " ",
                              wanted.sizes(), ", ", found.empty() ? "missing" : "got another",
                              " in the checkpoint"));
    return {};
  }
};

// Whether there is any of a parameter's fields.
struct Look {
  const NamedTensors& in;
  const Place place;
  bool found = false;

  void operator()(const char* field, const auto&...) { found |= in.contains(place(field)); }
};

}  // namespace

std::string optimizer_kind(const std::string& owner, const Optimizer& optimizer) {
  std::string kind;
  try {
    for (const auto& group : optimizer.param_groups())
      with_classes(group.options(), [&](const auto& classes) { kind = classes.name; });
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(owner + ": " + error.what());
  }
  return kind;
}

NamedTensors optimizer_state(const Optimizer& optimizer, const TrainingTensors& parameters) {
  NamedTensors result;
  for (size_t i = 0; i < optimizer.param_groups().size(); ++i) {
    const OptimizerParamGroup& group = optimizer.param_groups()[i];
    with_classes(group.options(), [&]<class O, class S>(const Classes<O, S>&) {
      Write options{result, in_group(i)};
      fields(static_cast<const O&>(group.options()), options);
      for (const at::Tensor& parameter : group.params()) {
        const auto found = optimizer.state().find(parameter.unsafeGetTensorImpl());
        if (found == optimizer.state().end()) continue;
        Write state{result, in_state(parameters.name_of(parameter))};
        fields(static_cast<const S&>(*found->second), state);
      }
    });
  }
  return result;
}

ReadOptimizer::ReadOptimizer(const NamedTensors& stored, const Optimizer& optimizer,
                             const TrainingTensors& parameters, Faults& faults) {
  NamedTensors left = stored;
  for (size_t i = 0; i < optimizer.param_groups().size(); ++i) {
    const OptimizerParamGroup& group = optimizer.param_groups()[i];
    with_classes(group.options(), [&]<class O, class S>(const Classes<O, S>&) {
      auto options = std::make_unique<O>(static_cast<const O&>(group.options()));
      Read read{left, faults, in_group(i), {}};
      fields(*options, read);
      options_.push_back(std::move(options));
      for (const at::Tensor& parameter : group.params()) {
        const Place place = in_state(parameters.name_of(parameter));
        auto state = std::make_unique<S>();
        Look look{left, place};
        fields(*state, look);
        if (!look.found) continue;
        Read own{left, faults, place, parameter};
        fields(*state, own);
        states_.emplace_back(parameter.unsafeGetTensorImpl(), std::move(state));
      }
    });
  }
  for (const auto& [name, tensor] : left)
    faults.push_back("optimizer." + name + ": the optimizer has no such state");
}

void ReadOptimizer::put_into(Optimizer& optimizer) {
  optimizer.state().clear();
  for (auto& [parameter, state] : states_) optimizer.state()[parameter] = std::move(state);
  for (size_t i = 0; i < options_.size(); ++i)
    optimizer.param_groups()[i].set_options(std::move(options_[i]));
}

}  // namespace rankwise
