// The choice between kernels and composite form, and its name for summary() and doctor.
#include "path.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "../../kernels/device_support.h"
#include "kernel_support.h"
#include "term_product.h"

namespace rankwise {
namespace {

// The kernels' tensor-core instructions begin with sm_80.
constexpr int first_major = 8;

// "" when the device can run the kernels.
std::string missing_kernels(c10::DeviceIndex device) {
  const c10::cuda::CUDAGuard guard(device);
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const int error = kernels::device_support_error();
  if (error == cudaSuccess && major >= first_major) return "";
  const std::string name = "sm_" + std::to_string(major) + std::to_string(minor);
  if (error == cudaSuccess || error == cudaErrorNoKernelImageForDevice ||
      error == cudaErrorInvalidDeviceFunction || error == cudaErrorUnsupportedPtxVersion) {
    return "this build has no kernels for " + name;
  }
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  return "";
}

const std::string& known_missing_kernels(c10::DeviceIndex device) {
  static KernelSupport support(missing_kernels);
  return support.missing(device);
}

std::string path_cuda(const at::Tensor& tensor, at::IntArrayRef layer) {
  const std::string reason = composite_reason(tensor.scalar_type(), tensor.device());
  if (!reason.empty()) return "cuda (composite): " + reason;
  if (layer.empty()) return "cuda";
  TORCH_CHECK(layer.size() == 4, "path: layer must be (tokens, n_in, n_out, rank), got ",
              layer.size(), " numbers");
  const bool joined = tensor.scalar_type() != at::kFloat &&
                      takes_term(tensor.get_device(), {layer[0], layer[2], layer[1], layer[3]});
  return joined ? "cuda (sm_90a)" : "cuda (cuBLASLt)";
}

}  // namespace

bool has_kernels(const at::Device& device) {
  const c10::DeviceIndex index = device.index() < 0 ? c10::cuda::current_device() : device.index();
  return known_missing_kernels(index).empty();
}

std::string composite_reason(at::ScalarType dtype, const at::Device& device) {
  const bool known = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  if (!known) return std::string("no kernels for ") + c10::toString(dtype);
  return has_kernels(device) ? "" : known_missing_kernels(device.index());
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CUDA, m) {
  m.impl("_lora_linear_path", &rankwise::path_cuda);
}
