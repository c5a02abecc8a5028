// Schedules and allocators for Python.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <rankwise/rank_allocator.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"

namespace py = pybind11;
using rankwise::AdaLoRAOptions;
using rankwise::Allocation;
using rankwise::BudgetSchedule;
using rankwise::RankAllocator;

namespace {

void bind_schedule(py::module_& m) {
  py::class_<AdaLoRAOptions>(m, "AdaLoRAOptions")
      .def(py::init([](int64_t initial_rank, int64_t target_rank, int64_t total_steps,
                       int64_t warmup_steps, int64_t final_steps, int64_t allocation_interval,
                       double beta1, double beta2, bool count_parameters, int64_t min_rank,
                       bool shrink) {
             AdaLoRAOptions options;
             options.initial_rank(initial_rank).target_rank(target_rank).total_steps(total_steps);
             options.warmup_steps(warmup_steps).final_steps(final_steps);
             options.allocation_interval(allocation_interval).beta1(beta1).beta2(beta2);
             options.budget_unit(count_parameters ? rankwise::BudgetUnit::parameters
                                                  : rankwise::BudgetUnit::triplets);
             options.min_rank(min_rank).shrink(shrink).check();
             return options;
           }),
           py::kw_only(), py::arg("initial_rank"), py::arg("target_rank"), py::arg("total_steps"),
           py::arg("warmup_steps"), py::arg("final_steps"), py::arg("allocation_interval"),
           py::arg("beta1"), py::arg("beta2"), py::arg("count_parameters"), py::arg("min_rank"),
           py::arg("shrink"));
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

auto taking_optimizer(void (RankAllocator::*member)(const rankwise::OptimizerView&)) {
  return
      [member](RankAllocator& self, StateOf state_of, const std::optional<at::Tensor>& found_inf) {
        released([&] { (self.*member)({std::move(state_of), found_inf.value_or(at::Tensor())}); });
      };
}

void bind_allocator(py::module_& m) {
  py::class_<rankwise::Adapter>(m, "Adapter")
      .def(py::init([](std::string name, at::Tensor A, at::Tensor B, at::Tensor E, int64_t rank,
                       std::function<void(int64_t)> set_rank) {
             return rankwise::Adapter{std::move(name), std::move(A), std::move(B),
                                      std::move(E),    rank,         std::move(set_rank)};
           }),
           py::arg("name"), py::arg("lora_A"), py::arg("lora_B"), py::arg("lora_E"),
           py::arg("rank"), py::arg("set_rank") = py::none());
  py::class_<RankAllocator>(m, "RankAllocator")
      .def(py::init<std::vector<rankwise::Adapter>, const AdaLoRAOptions&>())
      .def("step", taking_optimizer(&RankAllocator::step), py::arg("state_of"),
           py::arg("found_inf"))
      .def("freeze", taking_optimizer(&RankAllocator::freeze), py::arg("state_of"),
           py::arg("found_inf"))
      .def(
          "orthogonality_penalty",
          [](const RankAllocator& self, bool squared) {
            const py::gil_scoped_release release;
            return self.orthogonality_penalty(squared ? rankwise::OrthogonalityForm::squared_sum
                                                      : rankwise::OrthogonalityForm::mean_norm);
          },
          py::arg("squared"))
      .def_property_readonly("schedule", &RankAllocator::schedule)
      .def_property_readonly("steps", &RankAllocator::steps)
      .def_property_readonly("skipped_steps", &RankAllocator::skipped_steps)
      .def_property_readonly("frozen", &RankAllocator::frozen)
      .def_property_readonly("ranks", &RankAllocator::ranks)
      .def_property_readonly("pattern", &RankAllocator::pattern)
      .def_property_readonly("scores", &RankAllocator::scores)
      .def_property_readonly("history", &RankAllocator::history)
      .def("state", &RankAllocator::state)
      .def("load_state", &RankAllocator::load_state);
}

}  // namespace

void bind_allocation(py::module_& m) {
  bind_schedule(m);
  bind_allocator(m);
}
