// What an allocator reads must be in memory.
#include "memory_check.h"

#include <rankwise/tensor_memory.h>

#include <stdexcept>

namespace rankwise {
namespace {

void check(const std::string& owner, const Adapter& adapter, const std::string& what,
           const at::Tensor& tensor) {
  const std::string kind = tensor.defined() ? kind_without_memory(tensor) : "";
  if (kind.empty()) return;
  throw std::invalid_argument(owner + ": " + what + " of '" + adapter.name +
                              "' must be dense, with data, got " + kind +
                              "; give the adapter plain tensors before the allocator is made");
}

}  // namespace

void check_memory(const std::string& owner, const Adapter& adapter, bool gradients) {
  constexpr std::array names = {"lora_A", "lora_B", "lora_E"};
  const std::array<at::Tensor, 3> factors = adapter.factors();
  for (size_t f = 0; f < factors.size(); ++f) {
    check(owner, adapter, names[f], factors[f]);
    if (gradients && factors[f].defined())
      check(owner, adapter, std::string("the gradient of ") + names[f], factors[f].grad());
  }
}

}  // namespace rankwise
