// The analysis of adapters for Python: rankwise._C.analysis.
#include <pybind11/stl.h>
#include <rankwise/rank_advice.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"

namespace py = pybind11;
namespace analysis = rankwise::analysis;
using rankwise::AdapterFile;
using rankwise::AdapterUpdate;
using Weights = std::vector<double>;

namespace {

void bind_results(py::module_& m) {
  py::class_<analysis::DeltaSpectrum>(m, "DeltaSpectrum")
      .def_readonly("U", &analysis::DeltaSpectrum::U)
      .def_readonly("S", &analysis::DeltaSpectrum::S)
      .def_readonly("V", &analysis::DeltaSpectrum::V);
  py::class_<analysis::EffectiveRanks>(m, "EffectiveRanks")
      .def_readonly("entropy", &analysis::EffectiveRanks::entropy)
      .def_readonly("stable", &analysis::EffectiveRanks::stable)
      .def_readonly("energy_90", &analysis::EffectiveRanks::energy_90)
      .def_readonly("energy_95", &analysis::EffectiveRanks::energy_95)
      .def_readonly("energy_99", &analysis::EffectiveRanks::energy_99);
  py::class_<analysis::Amplification>(m, "Amplification")
      .def_readonly("factor", &analysis::Amplification::factor)
      .def_readonly("update_norm", &analysis::Amplification::update_norm)
      .def_readonly("weight_norm", &analysis::Amplification::weight_norm)
      .def_readonly("along_update", &analysis::Amplification::along_update)
      .def_readonly("along_weight", &analysis::Amplification::along_weight)
      .def_readonly("along_random", &analysis::Amplification::along_random)
      .def_readonly("rank", &analysis::Amplification::rank);
  py::class_<analysis::IntruderDirections>(m, "IntruderDirections")
      .def_readonly("cosines", &analysis::IntruderDirections::cosines)
      .def_readonly("singular_values", &analysis::IntruderDirections::singular_values)
      .def_readonly("indices", &analysis::IntruderDirections::indices);
  py::class_<analysis::Approximation>(m, "Approximation")
      .def_readonly("update", &analysis::Approximation::update)
      .def_readonly("error", &analysis::Approximation::error)
      .def_readonly("relative_error", &analysis::Approximation::relative_error);
  py::class_<analysis::Distance>(m, "Distance")
      .def_readonly("absolute", &analysis::Distance::absolute)
      .def_readonly("relative", &analysis::Distance::relative);
  py::class_<analysis::ModuleDistance>(m, "ModuleDistance")
      .def_readonly("module", &analysis::ModuleDistance::module)
      .def_readonly("distance", &analysis::ModuleDistance::distance);
}

// Ranks within a budget, and what they are for.
void bind_advice(py::module_& m) {
  py::class_<analysis::Agreement>(m, "Agreement")
      .def_readonly("directions", &analysis::Agreement::directions)
      .def_readonly("overlap", &analysis::Agreement::overlap)
      .def_readonly("chance", &analysis::Agreement::chance);
  py::class_<analysis::RankRoom>(m, "RankRoom")
      .def(py::init([](int64_t cost, int64_t lowest, int64_t highest) {
        return analysis::RankRoom{cost, lowest, highest};
      }));
  m.def("agreement", &analysis::agreement, py::call_guard<py::gil_scoped_release>());
  m.def("in_proportion", &analysis::in_proportion);
  m.def("best_directions", &analysis::best_directions);
}

void bind_options(py::module_& m) {
  py::enum_<analysis::Subspace>(m, "Subspace")
      .value("input", analysis::Subspace::input)
      .value("output", analysis::Subspace::output)
      .value("lora_A", analysis::Subspace::lora_A)
      .value("lora_B", analysis::Subspace::lora_B);
  py::enum_<analysis::Combination>(m, "Combination")
      .value("linear", analysis::Combination::linear)
      .value("ties", analysis::Combination::ties)
      .value("dare_linear", analysis::Combination::dare_linear)
      .value("dare_ties", analysis::Combination::dare_ties)
      .value("magnitude_prune", analysis::Combination::magnitude_prune);
  py::class_<analysis::CombineOptions>(m, "CombineOptions")
      .def(py::init([](analysis::Combination method, std::optional<int64_t> rank, double density,
                       bool sign_by_count, uint64_t seed) {
             return analysis::CombineOptions{method, rank, density, sign_by_count, seed};
           }),
           py::arg("method"), py::arg("rank"), py::arg("density"), py::arg("sign_by_count"),
           py::arg("seed"));
}

}  // namespace

void bind_analysis(py::module_& parent) {
  py::module_ m = parent.def_submodule("analysis");
  bind_results(m);
  bind_options(m);
  bind_advice(m);
  const auto free = py::call_guard<py::gil_scoped_release>();
  m.def("delta_spectrum", &analysis::delta_spectrum, free);
  m.def("subspace_similarity", &analysis::subspace_similarity, free);
  m.def("effective_ranks", &analysis::effective_ranks, free);
  m.def("amplification_factor", &analysis::amplification_factor, free);
  m.def("intruder_directions", &analysis::intruder_directions, free);
  m.def("truncate", &analysis::truncate, free);
  m.def("combine",
        py::overload_cast<const std::vector<AdapterUpdate>&, const Weights&,
                          const analysis::CombineOptions&>(&analysis::combine),
        free);
  m.def("combine_files",
        py::overload_cast<const std::vector<AdapterFile>&, const Weights&,
                          const analysis::CombineOptions&>(&analysis::combine),
        free);
  m.def("distance", &analysis::distance, free);
  m.def("distances", &analysis::distances, free);
}
