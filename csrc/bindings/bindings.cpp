// rankwise._C: allocators and the file layer for Python. Importing it loads librankwise, which
// registers the ops.
#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.attr("cuda") = bool(RANKWISE_CUDA_BUILT);
  m.attr("cuda_architectures") = RANKWISE_CUDA_ARCHITECTURES;
  bind_allocation(m);
  bind_cpu_path(m);
  bind_files(m);
  bind_tensor_memory(m);
  bind_analysis(m);
}
