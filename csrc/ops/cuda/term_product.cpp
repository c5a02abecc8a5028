#include "term_product.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <cstdlib>
#include <string_view>
#include <vector>

#include "../../kernels/hopper/linear_product.h"
#include "../checks.h"
#include "launch.h"

namespace rankwise {
namespace {

// What the copy engine reads: rows at multiples of 16 bytes.
constexpr int64_t bytes_between = 16;

bool lies_well(const at::Tensor& rows) {
  return rows.stride(1) == 1 && rows.stride(0) >= rows.size(1) &&
         rows.stride(0) * rows.element_size() % bytes_between == 0 &&
         reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % bytes_between == 0;
}

// A skinny matrix, copied where it does not lie well.
at::Tensor well_lying(const at::Tensor& skinny) {
  if (lies_well(skinny)) return skinny;
  const int64_t step = bytes_between / static_cast<int64_t>(skinny.element_size());
  const int64_t stride = (skinny.size(1) + step - 1) / step * step;
  const at::Tensor copy = at::empty({skinny.size(0), stride}, skinny.options());
  return copy.narrow(1, 0, skinny.size(1)).copy_(skinny);
}

kernels::Operand operand(const at::Tensor& rows) {
  return {rows.const_data_ptr(), rows.stride(0)};
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

std::vector<ProductDevice> ask_devices() {
  std::vector<ProductDevice> devices;
  for (int i = 0; i < c10::cuda::device_count(); ++i) {
    devices.push_back({attribute(cudaDevAttrComputeCapabilityMajor, i),
                       attribute(cudaDevAttrComputeCapabilityMinor, i),
                       attribute(cudaDevAttrMultiProcessorCount, i)});
  }
  return devices;
}

ProductDevice product_device(c10::DeviceIndex index) {
  static const std::vector<ProductDevice> devices = ask_devices();
  return devices.at(index);
}

// The kernel has run under the execution model alone: a process must ask for it.
bool asked_for() {
  static const bool asked = [] {
    const char* value = std::getenv("RANKWISE_TERM_PRODUCT");
    return value != nullptr && std::string_view(value) == "on";
  }();
  return asked;
}

}  // namespace

bool takes_term(c10::DeviceIndex device, const ProductSizes& sizes) {
  return asked_for() && sums_take_the_term(product_device(device), sizes);
}

bool joins_term(const CudaAdapter& adapter, const at::Tensor& left, const at::Tensor& right) {
  if (left.scalar_type() == at::kFloat || adapter.type() != kernel_type(left)) return false;
  const ProductSizes sizes{left.size(0), right.size(1), left.size(1), adapter.rank()};
  return takes_term(left.get_device(), sizes) && lies_well(left) &&
         (lies_well(right) || lies_well(right.t()));
}

at::Tensor product_with_term(const at::Tensor& left, const at::Tensor& right,
                             const at::Tensor& term_left, const at::Tensor& term_right,
                             const std::optional<at::Tensor>& bias_view) {
  const at::Tensor out = at::empty({left.size(0), right.size(1)}, left.options());
  const bool by_row = lies_well(right);
  const at::Tensor tail_left = well_lying(term_left);
  const at::Tensor tail_right = well_lying(by_row ? term_right : term_right.t());
  at::Tensor bias;
  if (has(bias_view)) {
    bias = bias_view->contiguous();
    if (reinterpret_cast<uintptr_t>(bias.const_data_ptr()) % bytes_between != 0)
      bias = bias.clone();
  }
  const kernels::LinearProduct problem{out.size(0),
                                       out.size(1),
                                       left.size(1),
                                       term_left.size(1),
                                       kernel_type(out),
                                       by_row,
                                       operand(left),
                                       operand(by_row ? right : right.t()),
                                       operand(tail_left),
                                       operand(tail_right),
                                       bias.defined() ? bias.const_data_ptr() : nullptr,
                                       out.mutable_data_ptr(),
                                       out.stride(0),
                                       product_device(out.get_device()).multiprocessors};
  check_launch(kernels::launch_linear_product(problem, current_stream()));
  return out;
}

}  // namespace rankwise
