// What tensors are that have no memory, for Python, and Python's classes for the library.
#include <rankwise/tensor_memory.h>

#include "bindings.h"

namespace py = pybind11;

namespace {

std::string class_name(const at::Tensor& tensor) {
  const py::gil_scoped_acquire lock;
  return py::str(py::type::of(py::cast(tensor)).attr("__name__"));
}

}  // namespace

void bind_tensor_memory(py::module_& m) {
  rankwise::set_class_name(&class_name);
  m.def("kind_without_memory", &rankwise::kind_without_memory);
  m.def("has_overlap", &rankwise::has_overlap);
}
