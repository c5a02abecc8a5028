// The parts of rankwise._C.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

// Calls `action` without the interpreter's lock; C++ warnings become Python's, also when it throws.
template <class Action>
auto released(const Action& action) {
  torch::PyWarningHandler warnings;
  try {
    const pybind11::gil_scoped_release release;
    return action();
  } catch (...) {
    warnings.set_in_exception();
    throw;
  }
}

void bind_analysis(pybind11::module_& m);
void bind_allocation(pybind11::module_& m);
void bind_cpu_path(pybind11::module_& m);
void bind_files(pybind11::module_& m);
void bind_spectral(pybind11::module_& m);
void bind_tensor_memory(pybind11::module_& m);
