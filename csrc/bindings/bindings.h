// The parts of rankwise._C.
#pragma once

#include <torch/csrc/utils/pybind.h>

void bind_allocation(pybind11::module_& m);
void bind_files(pybind11::module_& m);
