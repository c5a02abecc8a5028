// Allocators in torch's archives.
#include <ATen/ATen.h>
#include <rankwise/allocator.h>
#include <torch/serialize/archive.h>

#include <string>

namespace rankwise {

torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive,
                                            const Allocator& allocator) {
  c10::Dict<std::string, at::Tensor> state;
  for (const auto& [name, tensor] : allocator.state()) state.insert(name, tensor);
  archive.write(allocator.entry_, c10::IValue(state));
  return archive;
}

torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive,
                                           Allocator& allocator) {
  c10::IValue value;
  TORCH_CHECK(archive.try_read(allocator.entry_, value), allocator.owner_,
              ": the archive holds no allocator");
  std::map<std::string, at::Tensor> state;
  for (const auto& item : value.toGenericDict())
    state.emplace(item.key().toStringRef(), item.value().toTensor());
  allocator.load_state(state);
  return archive;
}

}  // namespace rankwise
