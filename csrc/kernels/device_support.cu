// Asks the driver about a kernel that is compiled like all others.
#include <cuda_runtime.h>

#include "device_support.h"

namespace rankwise::kernels {
namespace {

__global__ void probe_kernel() {}

}  // namespace

int device_support_error() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe_kernel));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace rankwise::kernels
