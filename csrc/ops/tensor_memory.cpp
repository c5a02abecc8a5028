// kind_without_memory: asks nothing that a tensor without memory cannot answer.
#include <c10/core/DispatchKeySet.h>
#include <c10/core/Layout.h>
#include <rankwise/tensor_memory.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

namespace rankwise {
namespace {

std::string any_subclass(const at::Tensor&) {
  return "a tensor subclass";
}

std::atomic<std::string (*)(const at::Tensor&)> name_of_class = &any_subclass;

// Tensors that stand for others, which hold the elements.
constexpr std::pair<c10::DispatchKey, const char*> stand_ins[] = {
    {c10::DispatchKey::Functionalize, "a functional tensor"},
    {c10::DispatchKey::FuncTorchBatched, "a batched tensor (vmap)"},
    {c10::DispatchKey::FuncTorchGradWrapper, "a tensor of a function transform"},
    {c10::DispatchKey::ZeroTensor, "a zero tensor without memory"},
};

// nullptr for a storage that refuses to tell.
const void* address_of(const c10::Storage& storage) try {
  return storage.data();
} catch (const c10::Error&) {
  return nullptr;
}

// Bytes from the start of the storage to the end of the last element.
size_t end_of(const at::Tensor& tensor) {
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return static_cast<size_t>(last + 1) * tensor.itemsize();
}

}  // namespace

std::string kind_without_memory(const at::Tensor& tensor) {
  if (!tensor.defined()) return "an undefined tensor";
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  const bool owns = impl.has_storage() && impl.unsafe_storage().unsafeGetStorageImpl() != nullptr;
  const void* const address = owns ? address_of(impl.unsafe_storage()) : nullptr;
  if (impl.key_set().has(c10::DispatchKey::Python) &&
      (impl.has_symbolic_sizes_strides() || address == nullptr)) {
    return name_of_class.load()(tensor);
  }
  if (tensor.layout() != at::kStrided) return c10::str(tensor.layout());
  if (tensor.is_nested()) return "a nested tensor";
  if (tensor.is_meta()) return "meta";
  if (tensor.is_quantized()) return "quantized";
  for (const auto& [key, name] : stand_ins)
    if (impl.key_set().has(key)) return name;
  if (!tensor.is_cpu() && !tensor.is_cuda()) return "";  // reached by a copy
  if (!owns) return "a tensor without storage";
  if (tensor.numel() == 0) return "";
  if (address != nullptr && end_of(tensor) <= impl.unsafe_storage().nbytes()) return "";
  return "freed memory";
}

bool has_overlap(const at::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride and size, the smallest first
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1) steps.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : steps) {
    if (stride <= reach) return tensor.numel() > 0;
    reach += stride * (size - 1);
  }
  return false;
}

void set_class_name(std::string (*class_name)(const at::Tensor&)) {
  name_of_class = class_name;
}

}  // namespace rankwise
