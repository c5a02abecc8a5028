// The CPU's paths for Python.
#include <pybind11/stl.h>
#include <rankwise/cpu_path.h>

#include "bindings.h"

namespace py = pybind11;
using rankwise::CpuPath;
using rankwise::MeasuredPath;

void bind_cpu_path(py::module_& m) {
  py::enum_<CpuPath>(m, "CpuPath")
      .value("micro_kernel", CpuPath::micro_kernel)
      .value("aten", CpuPath::aten)
      .value("measured", CpuPath::measured)
      .def("__str__", &rankwise::name_of, py::prepend());
  py::class_<MeasuredPath>(m, "MeasuredPath")
      .def_readonly("call", &MeasuredPath::call)
      .def_readonly("dtype", &MeasuredPath::dtype)
      .def_readonly("tokens", &MeasuredPath::tokens)
      .def_readonly("n_in", &MeasuredPath::in)
      .def_readonly("n_out", &MeasuredPath::out)
      .def_readonly("rank", &MeasuredPath::rank)
      .def_readonly("dropout", &MeasuredPath::dropout)
      .def_readonly("micro_kernel_ms", &MeasuredPath::micro_kernel_ms)
      .def_readonly("aten_ms", &MeasuredPath::aten_ms)
      .def_property_readonly(
          "chosen", [](const MeasuredPath& self) { return rankwise::name_of(self.chosen()); });
  m.def("set_cpu_path", &rankwise::set_cpu_path);
  m.def("cpu_path", &rankwise::cpu_path);
  m.def("measured_paths", &rankwise::measured_paths);
}
