// One question and at most one warning a device.
#include "kernel_support.h"

#include <c10/util/Exception.h>

namespace rankwise {

const std::string& KernelSupport::missing(c10::DeviceIndex device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto found = known_.find(device);
  if (found == known_.end()) {
    found = known_.emplace(device, probe_(device)).first;
    if (!found->second.empty()) {
      TORCH_WARN("rankwise: ", found->second, " (cuda:", static_cast<int>(device),
                 "): slower ATen operations take their place. Build with "
                 "RANKWISE_CUDA_ARCHITECTURES for this device to have them.");
    }
  }
  return found->second;
}

}  // namespace rankwise
