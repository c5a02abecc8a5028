// Optimizers that run callbacks after each step, for programs in C++.
#pragma once

#include <rankwise/allocator.h>
#include <torch/optim.h>

#include <algorithm>
#include <functional>
#include <list>
#include <memory>
#include <utility>

namespace rankwise::optim {

using Callback = std::function<void(const OptimizerView&)>;

/// Removes its callback; does nothing once the optimizer is gone.
class CallbackHandle {
 public:
  CallbackHandle(std::weak_ptr<std::list<Callback>> list, std::list<Callback>::iterator place)
      : list_(std::move(list)), place_(place) {}

  void remove() {
    if (const auto list = list_.lock()) list->erase(place_);
    list_.reset();
  }

 private:
  std::weak_ptr<std::list<Callback>> list_;
  std::list<Callback>::iterator place_;
};

/// The state tensors of torch::optim's optimizers that lie along a parameter's elements; nullopt
/// for a state of another kind.
inline std::optional<Moments> moments_in(const torch::optim::OptimizerParamState& state) {
  using namespace torch::optim;
  Moments moments;
  if (const auto* adamw = dynamic_cast<const AdamWParamState*>(&state)) {
    moments = {{adamw->exp_avg()}, {adamw->exp_avg_sq(), adamw->max_exp_avg_sq()}};
  } else if (const auto* adam = dynamic_cast<const AdamParamState*>(&state)) {
    moments = {{adam->exp_avg()}, {adam->exp_avg_sq(), adam->max_exp_avg_sq()}};
  } else if (const auto* sgd = dynamic_cast<const SGDParamState*>(&state)) {
    moments = {{sgd->momentum_buffer()}, {}};
  } else if (const auto* rms = dynamic_cast<const RMSpropParamState*>(&state)) {
    moments = {{rms->momentum_buffer(), rms->grad_avg()}, {rms->square_avg()}};
  } else if (const auto* adagrad = dynamic_cast<const AdagradParamState*>(&state)) {
    moments = {{}, {adagrad->sum()}};
  } else {
    return std::nullopt;
  }
  for (auto* kind : {&moments.first, &moments.second})
    std::erase_if(*kind, [](const at::Tensor& tensor) { return !tensor.defined(); });
  return moments;
}

/// A torch::optim optimizer that calls back after each step, before gradients are cleared, in the
/// thread of the step. State, save and load are the optimizer's own:
///
///   rankwise::optim::WithCallbacks<torch::optim::AdamW> optimizer(parameters, options);
///   allocator.attach(optimizer);
template <class Optimizer>
class WithCallbacks : public Optimizer {
 public:
  using Optimizer::Optimizer;

  /// As the optimizer's own step; an exception of a callback leaves the step taken.
  at::Tensor step(torch::optim::Optimizer::LossClosure closure = nullptr) override {
    const at::Tensor loss = Optimizer::step(std::move(closure));
    const OptimizerView view{
        .state_of =
            [this](const at::Tensor& parameter) {
              const auto moments = moments_of(parameter);
              return moments ? std::optional(moments->all()) : std::nullopt;
            },
        .found_inf = {},
        .holds = [this](const at::Tensor& parameter) { return steps(parameter); },
        .moments_of = [this](const at::Tensor& parameter) { return moments_of(parameter); }};
    for (const Callback& callback : *callbacks_) callback(view);
    return loss;
  }

  /// Callbacks run in the order in which they were added.
  CallbackHandle add_callback(Callback callback) {
    return {callbacks_, callbacks_->insert(callbacks_->end(), std::move(callback))};
  }

 private:
  // nullopt where state might be elsewhere: in another optimizer, or under another parameter
  // (LBFGS).
  std::optional<Moments> moments_of(const at::Tensor& parameter) {
    const auto& state = this->state();
    const auto it = state.find(parameter.unsafeGetTensorImpl());
    if (it != state.end()) return moments_in(*it->second);
    const bool stepped = parameter.grad().defined() && !state.empty();
    if (parameter.requires_grad() && (stepped || !steps(parameter))) return std::nullopt;
    return Moments();
  }

  bool steps(const at::Tensor& parameter) {
    return std::ranges::any_of(this->param_groups(), [&](const auto& group) {
      return std::ranges::any_of(group.params(),
                                 [&](const at::Tensor& own) { return own.is_same(parameter); });
    });
  }

  std::shared_ptr<std::list<Callback>> callbacks_ = std::make_shared<std::list<Callback>>();
};

}  // namespace rankwise::optim
