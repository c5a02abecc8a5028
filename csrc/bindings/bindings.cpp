// rankwise._C: what was built, for the import check. Importing it loads librankwise, which
// registers the ops.
#include <torch/csrc/utils/pybind.h>

PYBIND11_MODULE(_C, m) {
  m.attr("built_for_torch") = RANKWISE_BUILT_FOR_TORCH;
  m.attr("cuda") = bool(RANKWISE_CUDA_BUILT);
}
