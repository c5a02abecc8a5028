// Schedules and allocators for Python.
#include <pybind11/functional.h>
#include <pybind11/operators.h>
#include <pybind11/stl.h>
#include <rankwise/rank_allocator.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "bindings.h"

namespace py = pybind11;
using rankwise::AdaLoRAOptions;
using rankwise::Allocation;
using rankwise::AllocationSettings;
using rankwise::Allocator;
using rankwise::BudgetSchedule;
using rankwise::BudgetUnit;
using rankwise::Directions;
using rankwise::OptimizerView;
using rankwise::RankAllocator;

namespace {

using Values = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double, double, double,
                          BudgetUnit, int64_t, bool>;

Values values_of(const AllocationSettings& s) {
  return {s.target_rank,         s.total_steps, s.warmup_steps, s.final_steps,
          s.allocation_interval, s.beta1,       s.beta2,        s.orthogonality_weight,
          s.budget_unit,         s.min_rank,    s.shrink};
}

AllocationSettings settings_of(const Values& values) {
  return std::apply([](auto... value) { return AllocationSettings{value...}; }, values);
}

/// A value: compared, hashed, copied and pickled with the layers that keep it.
void bind_settings(py::module_& m) {
  py::enum_<BudgetUnit>(m, "BudgetUnit")
      .value("triplets", BudgetUnit::triplets)
      .value("parameters", BudgetUnit::parameters);
  py::class_<AllocationSettings>(m, "AllocationSettings")
      .def(py::init<>())
      .def_readwrite("target_rank", &AllocationSettings::target_rank)
      .def_readwrite("total_steps", &AllocationSettings::total_steps)
      .def_readwrite("warmup_steps", &AllocationSettings::warmup_steps)
      .def_readwrite("final_steps", &AllocationSettings::final_steps)
      .def_readwrite("allocation_interval", &AllocationSettings::allocation_interval)
      .def_readwrite("beta1", &AllocationSettings::beta1)
      .def_readwrite("beta2", &AllocationSettings::beta2)
      .def_readwrite("orthogonality_weight", &AllocationSettings::orthogonality_weight)
      .def_readwrite("budget_unit", &AllocationSettings::budget_unit)
      .def_readwrite("min_rank", &AllocationSettings::min_rank)
      .def_readwrite("shrink", &AllocationSettings::shrink)
      .def(py::self == py::self)
      .def("__hash__",
           [](const AllocationSettings& self) { return py::hash(py::cast(values_of(self))); })
      .def(py::pickle(&values_of, &settings_of));
}

void bind_schedule(py::module_& m) {
  py::class_<AdaLoRAOptions>(m, "AdaLoRAOptions")
      .def(py::init<int64_t, const AllocationSettings&>(), py::arg("initial_rank"),
           py::arg("settings"))
      .def("check", &AdaLoRAOptions::check);
  py::class_<BudgetSchedule>(m, "BudgetSchedule")
      .def(py::init<int64_t, int64_t, const AdaLoRAOptions&>())
      .def_property_readonly("initial_budget", &BudgetSchedule::initial_budget)
      .def_property_readonly("final_budget", &BudgetSchedule::final_budget)
      .def("budget", &BudgetSchedule::budget, py::arg("step"))
      .def("allocates", &BudgetSchedule::allocates, py::arg("step"));
  py::class_<Allocation>(m, "Allocation")
      .def_readonly("step", &Allocation::step)
      .def_readonly("budget", &Allocation::budget)
      .def_readonly("ranks", &Allocation::ranks)
      .def_readonly("mean_score", &Allocation::mean_score)
      .def_readonly("largest_score", &Allocation::largest_score)
      .def_readonly("lowest_kept", &Allocation::lowest_kept)
      .def_readonly("highest_pruned", &Allocation::highest_pruned);
}

using StateOf = std::function<std::optional<std::vector<at::Tensor>>(const at::Tensor&)>;
using Holds = std::function<bool(const at::Tensor&)>;
using Kinds = std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>>;  // as Moments
using KindsOf = std::function<std::optional<Kinds>(const at::Tensor&)>;

OptimizerView view_of(StateOf state_of, const std::optional<at::Tensor>& found_inf, Holds holds,
                      KindsOf moments_of) {
  OptimizerView view{std::move(state_of), found_inf.value_or(at::Tensor()), std::move(holds)};
  if (moments_of) {
    view.moments_of = [of = std::move(moments_of)](const at::Tensor& parameter) {
      auto kinds = of(parameter);
      using rankwise::Moments;
      return kinds ? std::optional(Moments{std::move(kinds->first), std::move(kinds->second)})
                   : std::nullopt;
    };
  }
  return view;
}

template <class Owner>
auto taking_optimizer(void (Owner::*member)(const OptimizerView&)) {
  return [member](Owner& self, StateOf state_of, const std::optional<at::Tensor>& found_inf,
                  Holds holds, KindsOf moments_of) {
    released([&] {
      (self.*
       member)(view_of(std::move(state_of), found_inf, std::move(holds), std::move(moments_of)));
    });
  };
}

/// Copied and pickled with the layers that have them; its allocator stays behind.
void bind_directions(py::module_& m) {
  const auto values = [](const Directions& self) {
    return std::make_tuple(self.order(), self.first_rank(), self.origin(), self.movable);
  };
  const auto from = [](const std::tuple<std::vector<int64_t>, int64_t, uint64_t, bool>& values) {
    return std::make_shared<Directions>(std::make_from_tuple<Directions>(values));
  };
  py::class_<Directions, std::shared_ptr<Directions>>(m, "Directions")
      .def(py::init<int64_t, int64_t>(), py::arg("capacity"), py::arg("first_rank"))
      .def_property("order", &Directions::order, &Directions::set_order)
      .def_property_readonly("first_rank", &Directions::first_rank)
      .def_property_readonly("origin", &Directions::origin)
      .def_property_readonly(
          "allocated",
          [](const Directions& self) {
            const auto stepped = self.allocator.lock();
            return stepped && *stepped;
          },
          "Whether they have an allocator that has made steps.")
      .def_readwrite("movable", &Directions::movable)
      .def("in_state", &Directions::in_state, py::arg("rank"))
      .def("state", &Directions::state, py::arg("rank"))
      .def("read", &Directions::read, py::arg("state"))
      .def(py::pickle(values, from));
}

/// Whether DDP waits for a tensor's gradient in the backward pass: its hooks are such lambdas.
bool watched(const at::Tensor& tensor) {
  const auto accumulator = torch::autograd::impl::try_get_grad_accumulator(tensor);
  return accumulator && std::ranges::any_of(accumulator->post_hooks(), [](const auto& hook) {
           return dynamic_cast<torch::autograd::utils::LambdaPostHook*>(hook.get());
         });
}

void bind_allocator(py::module_& m) {
  py::class_<rankwise::Adapter>(m, "Adapter")
      .def(py::init([](std::string name, at::Tensor A, at::Tensor B, std::optional<at::Tensor> E,
                       int64_t rank, std::function<void(int64_t)> set_rank,
                       std::function<int64_t()> rank_now, std::shared_ptr<Directions> directions,
                       double scaling) {
             return rankwise::Adapter{std::move(name),
                                      std::move(A),
                                      std::move(B),
                                      E.value_or(at::Tensor()),
                                      rank,
                                      std::move(set_rank),
                                      std::move(rank_now),
                                      std::move(directions),
                                      scaling};
           }),
           py::arg("name"), py::arg("lora_A"), py::arg("lora_B"), py::arg("lora_E"),
           py::arg("rank"), py::arg("set_rank") = py::none(), py::arg("rank_now") = py::none(),
           py::arg("directions") = py::none(), py::arg("scaling") = 1.0);
  py::class_<Allocator>(m, "Allocator")
      .def("step", taking_optimizer(&Allocator::step), py::arg("state_of"), py::arg("found_inf"),
           py::arg("holds"), py::arg("moments_of") = py::none())
      .def("set_group", &Allocator::set_group, py::arg("all_gather"))
      .def("detach", &Allocator::detach)
      .def_property_readonly("in_charge", &Allocator::in_charge)
      .def_property_readonly("steps", &Allocator::steps)
      .def_property_readonly("skipped_steps", &Allocator::skipped_steps)
      .def_property_readonly("frozen", &Allocator::frozen)
      .def_property_readonly("budget", &Allocator::budget)
      .def_property_readonly("ranks", &Allocator::ranks)
      .def("replace_factors", [](Allocator& self, const std::string& adapter, const at::Tensor& A,
                                 const at::Tensor& B, const std::optional<at::Tensor>& E) {
        self.replace_factors(adapter, A, B, E.value_or(at::Tensor()));
      });
  py::class_<RankAllocator, Allocator>(m, "RankAllocator")
      .def(py::init<std::vector<rankwise::Adapter>, const AdaLoRAOptions&>())
      .def("freeze", taking_optimizer(&RankAllocator::freeze), py::arg("state_of"),
           py::arg("found_inf"), py::arg("holds"), py::arg("moments_of") = py::none())
      .def(
          "orthogonality_penalty",
          [](const RankAllocator& self, bool squared) {
            const py::gil_scoped_release release;
            return self.orthogonality_penalty(squared ? rankwise::OrthogonalityForm::squared_sum
                                                      : rankwise::OrthogonalityForm::mean_norm);
          },
          py::arg("squared"))
      .def_property_readonly("schedule", &RankAllocator::schedule)
      .def_property_readonly("pattern", &RankAllocator::pattern)
      .def_property_readonly("scores", &RankAllocator::scores)
      .def_property_readonly("history", &RankAllocator::history)
      .def("state", &RankAllocator::state)
      .def("load_state", &RankAllocator::load_state, py::arg("state"), py::arg("at_work") = true);
}

}  // namespace

void bind_allocation(py::module_& m) {
  bind_settings(m);
  bind_schedule(m);
  bind_directions(m);
  bind_allocator(m);
  bind_spectral(m);
  m.def("watched", [](const std::vector<at::Tensor>& tensors) {
    return std::any_of(tensors.begin(), tensors.end(), watched);
  });
}
