#include "term_product.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <cstdlib>
#include <string_view>
#include <vector>

#include "../../kernels/hopper/linear_product.h"
#include "../../kernels/split_term.h"
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

// A matrix of so many rows and columns that lies well, to be written.
at::Tensor well_lying(int64_t rows, int64_t cols, const at::TensorOptions& options) {
  const auto step = bytes_between / static_cast<int64_t>(options.dtype().itemsize());
  return at::empty({rows, (cols + step - 1) / step * step}, options).narrow(1, 0, cols);
}

// A skinny matrix, copied where it does not lie well.
at::Tensor well_lying(const at::Tensor& skinny) {
  if (lies_well(skinny)) return skinny;
  return well_lying(skinny.size(0), skinny.size(1), skinny.options()).copy_(skinny);
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

// Directions of the term in the product. Float32 factors have three parts of bfloat16
// (split_term.h), which has their range; float16 has not. 0: the product takes no such term.
int64_t directions(int64_t rank, kernels::Type factors, kernels::Type product) {
  using kernels::Type;
  if (product == Type::float32) return 0;
  if (factors == product) return rank;
  return product == Type::bfloat16 ? kernels::split_parts * rank : 0;
}

// float32, and its parts in `to`.
kernels::SplitMatrix parts(const at::Tensor& from, const at::Tensor& to, int64_t part_stride) {
  return {from.size(0),   from.size(1),   from.const_data_ptr<float>(),
          from.stride(0), from.stride(1), to.mutable_data_ptr(),
          to.stride(0),   part_stride};
}

// For left right and its term.
int beside(const CudaAdapter& adapter, const at::Tensor& left, const at::Tensor& right,
           const ProductTerm& term, int64_t reuse) {
  if (!term.defined() || adapter.dropout.active()) return 0;
  const ProductSizes sizes{left.size(0), right.size(1), left.size(1), term.left.size(1)};
  return multiprocessors_beside(product_device(left.get_device()), sizes, adapter.rank(), reuse);
}

ProductTerm joined_term(const CudaAdapter& adapter, const at::Tensor& left, const at::Tensor& right,
                        const at::Tensor& term_right, bool masked) {
  const int64_t rank = adapter.rank();
  const ProductSizes sizes{left.size(0), right.size(1), left.size(1),
                           directions(rank, adapter.type(), kernel_type(left))};
  const bool by_row = lies_well(right);
  if (!takes_term(left.get_device(), sizes) || !lies_well(left)) return {};
  if (!by_row && (masked || !lies_well(right.t()))) return {};
  const at::Tensor as_read = by_row ? term_right : term_right.t();
  ProductTerm term{well_lying(sizes.rows, sizes.rank, left.options()), as_read, by_row};
  if (adapter.type() == kernel_type(left)) {
    term.right = well_lying(as_read);
    return term;
  }
  term.right = by_row ? well_lying(sizes.rank, sizes.cols, left.options())
                      : well_lying(sizes.cols, sizes.rank, left.options());
  term.right_parts = parts(as_read, term.right, by_row ? rank * term.right.stride(0) : rank);
  return term;
}

kernels::Beside beside_of(const CudaAdapter& adapter, const ProductTerm& term) {
  kernels::Beside beside;
  beside.blocks = term.beside;
  beside.rank = adapter.rank();
  beside.cut = term.split();
  return beside;
}

at::Tensor multiply(const at::Tensor& left, const at::Tensor& right, const ProductTerm& term,
                    const std::optional<at::Tensor>& bias_view, const kernels::DropoutMask& mask,
                    const kernels::Beside& beside) {
  const at::Tensor out = at::empty({left.size(0), right.size(1)}, left.options());
  at::Tensor bias;
  if (has(bias_view)) {
    bias = bias_view->contiguous();
    if (reinterpret_cast<uintptr_t>(bias.const_data_ptr()) % bytes_between != 0)
      bias = bias.clone();
  }
  const kernels::LinearProduct problem{out.size(0),
                                       out.size(1),
                                       left.size(1),
                                       term.left.size(1),
                                       kernel_type(out),
                                       term.by_row,
                                       operand(left),
                                       operand(term.by_row ? right : right.t()),
                                       operand(term.left),
                                       operand(term.right),
                                       bias.defined() ? bias.const_data_ptr() : nullptr,
                                       out.mutable_data_ptr(),
                                       out.stride(0),
                                       product_device(out.get_device()).multiprocessors,
                                       mask,
                                       beside};
  check_launch(kernels::launch_linear_product(problem, current_stream()));
  return out;
}

}  // namespace

bool takes_term(c10::DeviceIndex device, const ProductSizes& sizes) {
  return asked_for() && sums_take_the_term(product_device(device), sizes);
}

ProductTerm output_term(const CudaAdapter& adapter, const at::Tensor& x, const at::Tensor& w) {
  if (adapter.rank() == 0) return {};
  ProductTerm term = joined_term(adapter, x, w.t(), adapter.B.t(), /*masked=*/false);
  if (!term.by_row && (term.split() || lies_well(adapter.A))) {
    term.beside = beside(adapter, x, w.t(), term, /*reuse=*/w.size(0));
  }
  return term;
}

ProductTerm input_term(const CudaAdapter& adapter, const at::Tensor& dy, const at::Tensor& w,
                       const at::Tensor& x) {
  if (adapter.rank() == 0) return {};
  ProductTerm term = joined_term(adapter, dy, w, adapter.A, adapter.dropout.active());
  if (!x.defined() || !term.by_row || !lies_well(x)) return term;
  term.beside = beside(adapter, dy, w, term, /*reuse=*/w.size(0));
  if (term.beside > 0 && term.split()) {
    term.dh_parts = at::empty({dy.size(0), kernels::cut_rows}, dy.options());
  }
  return term;
}

void write(const ProductTerm& term, const at::Tensor& left) {
  if (term.split()) {
    check_launch(kernels::launch_split_term(parts(left, term.left, left.size(1)), term.right_parts,
                                            current_stream()));
  } else {
    term.left.copy_(left);
  }
}

at::Tensor product_with_term(const at::Tensor& left, const at::Tensor& right,
                             const ProductTerm& term, const std::optional<at::Tensor>& bias,
                             const kernels::DropoutMask& mask) {
  return multiply(left, right, term, bias, mask, {});
}

at::Tensor product_beside_shrink(const CudaAdapter& adapter, const at::Tensor& x,
                                 const at::Tensor& w, const ProductTerm& term,
                                 const std::optional<at::Tensor>& bias, const at::Tensor& hidden) {
  at::Tensor A = adapter.A;
  if (term.split()) {
    A = at::empty({kernels::cut_rows, x.size(1)}, x.options());
    const kernels::CutFactor cut{
        adapter.rank(),       x.size(1),  adapter.A.const_data_ptr<float>(), adapter.A.stride(0),
        A.mutable_data_ptr(), A.stride(0)};
    check_launch(kernels::launch_cut_factor(cut, term.right_parts, current_stream()));
  }
  c10::DataPtr flags = scratch(kernels::beside_flags(x.size(0)) * sizeof(uint32_t));
  kernels::Beside beside = beside_of(adapter, term);
  beside.A = operand(A);
  beside.E = adapter.gate();
  beside.scale = static_cast<float>(adapter.scaling);
  beside.hidden = hidden.mutable_data_ptr();
  beside.flags = static_cast<uint32_t*>(flags.mutable_get());
  return multiply(x, w.t(), term, bias, {}, beside);
}

InputProducts product_beside_input_factor(const CudaAdapter& adapter, const at::Tensor& dy,
                                          const at::Tensor& w, const ProductTerm& term,
                                          const at::Tensor& x) {
  kernels::Beside beside = beside_of(adapter, term);
  beside.x = operand(x);
  beside.dh = operand(term.split() ? term.dh_parts : term.left);
  beside.chunk = kernels::beside_chunk(x.size(0));
  const int64_t count = kernels::beside_slices(x.size(0), beside.chunk);
  c10::DataPtr slices = scratch(kernels::beside_partial_bytes(count, x.size(1), adapter.rank()));
  beside.partial = static_cast<float*>(slices.mutable_get());
  return {multiply(dy, w, term, {}, {}, beside), std::move(slices), count};
}

}  // namespace rankwise
