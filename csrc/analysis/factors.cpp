// Checked factors, and what is made of them.
#include "factors.h"

#include <ATen/ATen.h>
#include <rankwise/tensor_memory.h>

#include <cmath>
#include <stdexcept>

#include "../allocation/spectrum.h"

namespace rankwise::analysis {

void fail(const std::string& function, const std::string& reason) {
  throw std::invalid_argument(function + ": " + reason);
}

at::Tensor checked(const std::string& function, const std::string& argument,
                   const at::Tensor& tensor, at::IntArrayRef sizes) {
  std::string wanted = "floating [", got = "none";
  bool fits = tensor.defined() && tensor.is_floating_point() &&
              tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    wanted += (i > 0 ? ", " : "") + (sizes[i] < 0 ? "any" : std::to_string(sizes[i]));
    fits = fits && (sizes[i] < 0 || tensor.size(static_cast<int64_t>(i)) == sizes[i]);
  }
  if (tensor.defined()) {
    const std::string kind = kind_without_memory(tensor);
    if (!kind.empty()) fail(function, argument + " must be dense, with data, got " + kind);
    got = tensor.toString() + " " + c10::str(tensor.sizes());
  }
  if (!fits) fail(function, argument + " must be " + wanted + "], got " + got);
  return tensor.detach();
}

void check_finite(const std::string& function, const std::string& argument,
                  const at::Tensor& tensor) {
  if (!tensor.isfinite().all().item<bool>())
    fail(function, argument + " must be finite, got infinite or NaN values");
}

std::string named(const std::string& argument, const AdapterUpdate& update) {
  return argument + (update.module.empty() ? "" : " ('" + update.module + "')");
}

Factors factors_of(const std::string& function, const std::string& argument,
                   const AdapterUpdate& update) {
  const std::string of = " of " + named(argument, update);
  const auto double_of = [&](const char* name, const at::Tensor& tensor, int64_t rows,
                             int64_t columns) {
    const at::Tensor values =
        checked(function, name + of, tensor, {rows, columns}).to(at::kCPU, at::kDouble);
    check_finite(function, name + of, values);
    return values.contiguous();
  };
  Factors factors;
  factors.A = double_of("lora_A", update.lora_A, -1, -1);
  factors.B = double_of("lora_B", update.lora_B, -1, factors.A.size(0));
  if (!std::isfinite(update.scaling))
    fail(function, "scaling" + of + " must be finite, got " + std::to_string(update.scaling));
  if (update.lora_E.defined()) {
    const at::Tensor E = double_of("lora_E", update.lora_E, factors.A.size(0), 1);
    factors.B = factors.B * (E * update.scaling).t();
  } else {
    factors.B = factors.B * update.scaling;
  }
  return factors;
}

void check_same_shape(const std::string& function, const std::string& argument,
                      const Factors& factors, const std::string& other, const Factors& wanted) {
  const auto shape = [](const Factors& f) { return c10::str("[", f.out(), ", ", f.in(), "]"); };
  if (factors.in() == wanted.in() && factors.out() == wanted.out()) return;
  fail(function, argument + " must be an update of " + shape(wanted) + " like " + other +
                     ", got one of " + shape(factors));
}

double Factors::norm() const {
  const auto [Qb, Rb] = at::linalg_qr(B, "r");
  const auto [Qa, Ra] = at::linalg_qr(A.t(), "r");
  return norm_of(Rb.matmul(Ra.t()));
}

DeltaSpectrum spectrum_of(const Factors& factors) {
  const Spectrum found = rankwise::spectrum_of(factors.A, factors.B);
  return {found.U, found.S, found.V};
}

DeltaSpectrum above(double least, const DeltaSpectrum& spectrum) {
  const auto count = (spectrum.S > least).sum().item<int64_t>();
  return {spectrum.U.narrow(1, 0, count), spectrum.S.narrow(0, 0, count),
          spectrum.V.narrow(1, 0, count)};
}

DeltaSpectrum known(const DeltaSpectrum& spectrum) {
  const double largest = spectrum.S.numel() > 0 ? spectrum.S[0].item<double>() : 0;
  return above(1e-12 * largest, spectrum);
}

double norm_of(const at::Tensor& values) {
  return values.norm().item<double>();
}

}  // namespace rankwise::analysis
