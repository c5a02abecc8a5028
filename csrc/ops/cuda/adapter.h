// One call's adapter as the CUDA kernels take it, and the passes over x, dy and y that layers
// share.
#pragma once

#include <ATen/ATen.h>

#include <array>

#include "../../kernels/lora_linear.h"
#include "../checks.h"
#include "../dispatch.h"
#include "../dropout.h"
#include "../matrices.h"
#include "product_term.h"

namespace rankwise {

kernels::Type kernel_type(const at::Tensor& tensor);

// Memory for what runs on the current device and stream; may be used again by what follows there.
c10::DataPtr scratch(int64_t bytes);

// One call's active factors as the kernels take them, and the dropout of its input.
struct CudaAdapter {
  at::Tensor A, B, E;  // [rank, in], [out, rank], [rank] or undefined; unit column strides
  double scaling;
  Dropout dropout;
  at::Tensor seed;

  CudaAdapter(const AdapterOperands& of, const at::Tensor& seed_)
      : A(matrix(of.lora_A.narrow(0, 0, of.active()))),
        B(of.active() > 0 ? matrix(of.lora_B.narrow(1, 0, of.active())) : at::Tensor()),
        E(has(of.lora_E) ? of.lora_E->narrow(0, 0, of.active()).select(1, 0).contiguous()
                         : at::Tensor()),
        scaling(of.scaling),
        dropout(of.dropout_p),
        seed(seed_) {}

  int64_t rank() const { return A.size(0); }
  kernels::Type type() const { return kernel_type(A); }
  const void* gate() const { return E.defined() ? E.const_data_ptr() : nullptr; }

  float keep_scale() const {
    return dropout.active() ? static_cast<float>(dropout.keep_scale()) : 1.0f;
  }

  kernels::DropoutMask mask() const {
    if (!dropout.active()) return {};
    return {seed.const_data_ptr<int64_t>(), dropout.threshold()};
  }
};

// A factor's gradient to write the active part of: the other directions are zero already.
at::Tensor gradient_of(const at::Tensor& factor, int64_t capacity, int64_t rank);

struct OutputGradients {
  at::Tensor dh, dB, dE;  // undefined where not asked for
};

// dE that is still to be summed up, and where its terms lie.
struct PendingGate {
  kernels::GateGradient sum;
  c10::DataPtr scratch;
};

// dh = scaling * keep_scale * (dy B) o E^T, the gradient of mask(x) A^T; dB and dE from `hidden`.
// dh is the left matrix of `term`, if that is defined. `dE_later` leaves dE to
// input_factor_gradient.
PendingGate output_gradients(const CudaAdapter& adapter, const at::Tensor& dy,
                             const at::Tensor& hidden, const OutputGradients& out,
                             const ProductTerm& term = {}, bool dE_later = false);

// hidden = drop(x) A^T, and gated = hidden o E^T unless it is `hidden` itself; or, for a term that
// is defined, scaling * hidden o E^T as its left matrix.
void shrink(const CudaAdapter& adapter, const at::Tensor& x, const at::Tensor& hidden,
            const at::Tensor& gated, const ProductTerm& term = {});

// out = scaling * gated B^T, on top of a bias [out] or of a base's rows; at most one is defined.
void expand_output(const CudaAdapter& adapter, const at::Tensor& gated, const at::Tensor& out,
                   const at::Tensor& bias, const at::Tensor& base);

// out = mask(dh A).
void expand_input(const CudaAdapter& adapter, const at::Tensor& dh, const at::Tensor& out);

// dA = dh^T mask(x), and what is pending.
void input_factor_gradient(const CudaAdapter& adapter, const at::Tensor& x, const at::Tensor& dh,
                           const at::Tensor& dA, const PendingGate& pending = {});

// The same from slices that a product's launch has summed up (term_product.h).
void end_input_factor_gradient(const CudaAdapter& adapter, const at::Tensor& x,
                               const at::Tensor& dA, const c10::DataPtr& slices, int64_t count,
                               const PendingGate& pending);

// What dy gives of a layer over products: gradients of whole factors, and dh, which dA and x's come
// from. `output_mask`: x, A, B, E. `term` is x's, which dh joins. dE is pending if dA is asked for
// too.
struct OutputSide {
  OutputGradients d;
  PendingGate pending;
};
OutputSide output_side(const CudaAdapter& adapter, const AdapterOperands& operands,
                       const at::Tensor& dy, const at::Tensor& hidden,
                       std::array<bool, 4> output_mask, const ProductTerm& term = {});

// Gradients of a layer over products: of whole factors, and dh, which x's comes from. Undefined
// where not asked for.
struct ParameterGradients {
  at::Tensor dh, A, B, E;
};
// `output_mask`: x, A, B, E.
ParameterGradients parameter_gradients(const CudaAdapter& adapter, const AdapterOperands& operands,
                                       const at::Tensor& dy, const at::Tensor& input,
                                       const at::Tensor& hidden, std::array<bool, 4> output_mask);

}  // namespace rankwise
