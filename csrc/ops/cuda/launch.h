// What every CUDA implementation needs to launch kernels. Include it in files of the CUDA side.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include "../../kernels/element_type.h"

namespace rankwise {

// The current device's current stream, for launchers.
inline void* current_stream() {
  return c10::cuda::getCurrentCUDAStream().stream();
}

// Whether the current stream records a CUDA graph.
inline bool records_graph() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Throws for the error that a launcher returned.
inline void check_launch(int error) {
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

inline kernels::ElementType element_type(const char* op, at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return kernels::ElementType::bfloat16;
    case at::kHalf:
      return kernels::ElementType::float16;
    case at::kFloat:
      return kernels::ElementType::float32;
    case at::kDouble:
      return kernels::ElementType::float64;
    default:
      TORCH_CHECK(false, op, ": tensors must be bfloat16, float16, float32 or float64, got ",
                  dtype);
  }
}

// One launch serves one device.
inline void check_device(const char* op, const char* what, const at::Tensor& tensor,
                         const at::Device& device) {
  TORCH_CHECK(tensor.device() == device, op, ": all ", what, " must be on one device, got ", device,
              " and ", tensor.device());
}

}  // namespace rankwise
