// Whether the kernels can run on a device.
#pragma once

namespace rankwise::kernels {

// 0 when this binary holds code for the current device's architecture, or PTX the driver can
// compile for it; else the cudaError_t that says why not.
int device_support_error();

}  // namespace rankwise::kernels
