// Which devices a build has kernels for, asked once each; needs no CUDA to be tested.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <map>
#include <mutex>
#include <string>

namespace rankwise {

class KernelSupport {
 public:
  // Why a device cannot run the kernels; "" when it can.
  using Probe = std::function<std::string(c10::DeviceIndex)>;

  explicit KernelSupport(Probe probe) : probe_(std::move(probe)) {}

  // The probe's answer, asked at the first call for a device, which also warns if it is not "".
  const std::string& missing(c10::DeviceIndex device);

 private:
  Probe probe_;
  std::mutex mutex_;
  std::map<c10::DeviceIndex, std::string> known_;
};

}  // namespace rankwise
