// Arrays of plain structures on their way to a CUDA device, in one asynchronous copy.
#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <type_traits>
#include <vector>

#include "launch.h"

namespace rankwise {

// A vector becomes part of the copy with add() and lies on the device after upload().
class DeviceTable {
 public:
  // Returns where the array will start, for at().
  template <class T>
  size_t add(const std::vector<T>& values) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= alignment);
    const size_t start = (bytes_.size() + alignment - 1) / alignment * alignment;
    bytes_.resize(start + values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(bytes_.data() + start, values.data(), bytes_.size() - start);
    return start;
  }

  // On the current stream, which must not record a graph: a replay would read host memory that is
  // long somebody else's. The pinned memory is kept by its allocator until the copy is done; the
  // device's may be used again by what follows on the stream.
  void upload(const at::Device& device) {
    TORCH_CHECK(!records_graph(), "AdaLoRA's passes cannot be recorded in a CUDA graph");
    const auto size = static_cast<int64_t>(bytes_.size());
    const at::Tensor host = at::empty({size}, at::TensorOptions(at::kByte).pinned_memory(true));
    std::memcpy(host.mutable_data_ptr(), bytes_.data(), bytes_.size());
    device_ = host.to(device, /*non_blocking=*/true);
  }

  template <class T>
  const T* at(size_t start) const {
    return reinterpret_cast<const T*>(device_.const_data_ptr<uint8_t>() + start);
  }

 private:
  static constexpr size_t alignment = 16;
  std::vector<unsigned char> bytes_;
  at::Tensor device_;
};

}  // namespace rankwise
