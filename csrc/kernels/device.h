// What device code is written against: CUDA C++ and the few instructions it has no function for.
// Tests compile the same kernels for the CPU, against an execution model that gives these names.
#pragma once

#ifdef RANKWISE_CUDA_MODEL
#include <cuda_model/device.h>
#else
#include "device_cuda.h"
#endif
