// SpectralAllocator and its rules for Python.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <rankwise/spectral_allocator.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>

#include "bindings.h"

namespace py = pybind11;
using rankwise::ExchangeSettings;
using rankwise::GrowthOrder;
using rankwise::RankQuestion;
using rankwise::RankRule;
using rankwise::SpectralAllocator;
using rankwise::SpectralEvent;
using rankwise::SpectralOptions;
using rankwise::SpectralScore;

namespace {

void bind_rules(py::module_& m) {
  py::class_<RankQuestion>(m, "RankQuestion")
      .def_readonly("step", &RankQuestion::step)
      .def_readonly("budget", &RankQuestion::budget)
      .def_readonly("scores", &RankQuestion::scores)
      .def_readonly("young", &RankQuestion::young)
      .def_readonly("costs", &RankQuestion::costs)
      .def_readonly("lowest", &RankQuestion::lowest)
      .def_readonly("highest", &RankQuestion::highest)
      .def_readonly("unserved", &RankQuestion::unserved)
      .def_readonly("former", &RankQuestion::former)
      .def_property_readonly("ranks", &RankQuestion::ranks)
      .def("cost", &RankQuestion::cost, py::arg("ranks"));
  py::enum_<GrowthOrder>(m, "GrowthOrder")
      .value("least", GrowthOrder::least)
      .value("mean", GrowthOrder::mean)
      .value("gradient", GrowthOrder::gradient);
  py::class_<ExchangeSettings>(m, "ExchangeSettings")
      .def(py::init<>())
      .def_readwrite("threshold", &ExchangeSettings::threshold)
      .def_readwrite("hysteresis", &ExchangeSettings::hysteresis)
      .def_readwrite("max_moves", &ExchangeSettings::max_moves)
      .def_readwrite("growth", &ExchangeSettings::growth)
      .def_readwrite("kth_least", &ExchangeSettings::kth_least);
  m.def("exchange_rule", [](const ExchangeSettings& settings, const RankQuestion& question) {
    return rankwise::exchange_rule(settings)(question);
  });
}

void bind_options(py::module_& m) {
  py::enum_<SpectralScore>(m, "SpectralScore")
      .value("normalised", SpectralScore::normalised)
      .value("literal", SpectralScore::literal);
  py::class_<SpectralOptions>(m, "SpectralOptions")
      .def(py::init<>())
      .def("total_steps", [](SpectralOptions& o, int64_t v) { o.total_steps(v); })
      .def("warmup_steps", [](SpectralOptions& o, int64_t v) { o.warmup_steps(v); })
      .def("final_steps", [](SpectralOptions& o, int64_t v) { o.final_steps(v); })
      .def("allocation_interval", [](SpectralOptions& o, int64_t v) { o.allocation_interval(v); })
      .def("min_rank", [](SpectralOptions& o, int64_t v) { o.min_rank(v); })
      .def("max_rank", [](SpectralOptions& o, int64_t v) { o.max_rank(v); })
      .def("initial_budget", [](SpectralOptions& o, int64_t v) { o.initial_budget(v); })
      .def("final_budget", [](SpectralOptions& o, int64_t v) { o.final_budget(v); })
      .def("budget_at",
           [](SpectralOptions& o, std::function<int64_t(int64_t)> v) { o.budget_at(std::move(v)); })
      .def("score", [](SpectralOptions& o, SpectralScore v) { o.score(v); })
      .def("sensitivity_weight", [](SpectralOptions& o, double v) { o.sensitivity_weight(v); })
      .def("beta", [](SpectralOptions& o, double v) { o.beta(v); })
      .def("exchange", [](SpectralOptions& o, const ExchangeSettings& v) { o.exchange(v); })
      .def("rule", [](SpectralOptions& o, RankRule v) { o.rule(std::move(v)); })
      .def("min_age", [](SpectralOptions& o, int64_t v) { o.min_age(v); })
      .def("probes", [](SpectralOptions& o, int64_t v) { o.probes(v); })
      .def("ramp_steps", [](SpectralOptions& o, int64_t v) { o.ramp_steps(v); })
      .def("seed", [](SpectralOptions& o, int64_t v) { o.seed(v); })
      .def("check", &SpectralOptions::check);
}

}  // namespace

void bind_spectral(py::module_& m) {
  bind_rules(m);
  bind_options(m);
  py::class_<SpectralEvent>(m, "SpectralEvent")
      .def_readonly("step", &SpectralEvent::step)
      .def_readonly("budget", &SpectralEvent::budget)
      .def_readonly("bank", &SpectralEvent::bank)
      .def_readonly("ranks", &SpectralEvent::ranks)
      .def_readonly("dropped", &SpectralEvent::dropped)
      .def_readonly("added", &SpectralEvent::added)
      .def_readonly("change", &SpectralEvent::change)
      .def_readonly("lowest_kept", &SpectralEvent::lowest_kept)
      .def_readonly("highest_dropped", &SpectralEvent::highest_dropped);
  py::class_<SpectralAllocator, rankwise::Allocator>(m, "SpectralAllocator")
      .def(py::init<std::vector<rankwise::Adapter>, const SpectralOptions&>())
      .def_property_readonly("schedule", &SpectralAllocator::schedule)
      .def_property_readonly("bank", &SpectralAllocator::bank)
      .def_property_readonly("history", &SpectralAllocator::history)
      .def_property_readonly("last_event",
                             [](const SpectralAllocator& self) {
                               const auto& events = self.history();
                               return events.empty() ? std::nullopt : std::optional(events.back());
                             })
      .def_property_readonly("events",
                             [](const SpectralAllocator& self) { return self.history().size(); })
      .def("state", &SpectralAllocator::state)
      .def("load_state", &SpectralAllocator::load_state, py::arg("state"),
           py::arg("at_work") = true);
}
