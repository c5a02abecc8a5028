// A device for tests that is as late as can be: what is asked of it is done when the host waits for
// it. torch's PrivateUse1, with memory on the host and rankwise's CPU kernels.
#pragma once

#include <ATen/core/Tensor.h>

namespace late_device {

at::Device device();

// A copy of a tensor of the CPU, written when its turn comes.
at::Tensor put(const at::Tensor& tensor);
void overwrite(const at::Tensor& on_device, const at::Tensor& tensor);

// How often the host has waited: for numbers, or for a copy that was not called non_blocking.
int64_t waits();

// The device gets on by itself: the next tasks are done, at most so many.
void proceed(int64_t tasks);

}  // namespace late_device
