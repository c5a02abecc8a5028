// An update's factors as the analysis takes them: checked, float64 on the CPU, scaling and lora_E
// in B. All linear algebra here runs on one thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <rankwise/analysis.h>

#include <cstdint>
#include <string>

#include "../ops/cpu/blocks.h"

namespace rankwise::analysis {

// dW = B A: A [rank, in], B [out, rank].
struct Factors {
  at::Tensor A, B;

  int64_t in() const { return A.size(1); }
  int64_t out() const { return B.size(0); }
  double norm() const;
};

[[noreturn]] void fail(const std::string& function, const std::string& reason);

// An argument and its module, if that has a name, in messages.
std::string named(const std::string& argument, const AdapterUpdate& update);

// The factors of a function's argument. Throws std::invalid_argument.
Factors factors_of(const std::string& function, const std::string& argument,
                   const AdapterUpdate& update);

// A dense matrix or vector of floating values, detached. A negative size: any.
at::Tensor checked(const std::string& function, const std::string& argument,
                   const at::Tensor& tensor, at::IntArrayRef sizes);
void check_finite(const std::string& function, const std::string& argument,
                  const at::Tensor& tensor);
void check_same_shape(const std::string& function, const std::string& argument,
                      const Factors& factors, const std::string& other, const Factors& wanted);

// Runs `body` with the linear algebra inside on one thread, without autograd and autocast.
template <class Body>
auto on_one_thread(const Body& body) {
  decltype(body()) result;
  run_blocks(1, [&](int64_t) { result = body(); });
  return result;
}

DeltaSpectrum spectrum_of(const Factors& factors);

// The directions whose singular values are above `least`.
DeltaSpectrum above(double least, const DeltaSpectrum& spectrum);

// Those above 1e-12 of the largest: others are rounding.
DeltaSpectrum known(const DeltaSpectrum& spectrum);

double norm_of(const at::Tensor& values);

}  // namespace rankwise::analysis
