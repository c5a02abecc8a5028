// The arithmetic of AdaLoRA's importance (arXiv 2303.10512, section 3.2), the same on host and
// device. Compiled without contraction to fused multiply-adds, so that every processor gives the
// same bits.
#pragma once

#include <cmath>
#include <limits>

#include "../host_device.h"

namespace rankwise::kernels {

// Averages of numbers up to this one are finite.
template <class T>
constexpr T largest_sensitivity = std::numeric_limits<T>::max() / 4;

// |w dL/dw|, the first-order change of the loss when w is set to zero; finite whatever w is, as
// long as averages of it are.
template <class T>
RANKWISE_HOST_DEVICE inline T sensitivity_now(T parameter, T gradient) {
  const T now = std::fabs(parameter * gradient);
  return now < largest_sensitivity<T> ? now : largest_sensitivity<T>;
}

template <class T>
struct Decay {
  T beta1, beta2, one_minus_beta1, one_minus_beta2;

  // 1 - beta in double first, as Python's floats give it.
  RANKWISE_HOST_DEVICE Decay(double b1, double b2)
      : beta1(static_cast<T>(b1)),
        beta2(static_cast<T>(b2)),
        one_minus_beta1(static_cast<T>(1 - b1)),
        one_minus_beta2(static_cast<T>(1 - b2)) {}
};

// One step of both moving averages: sensitivity first, then its uncertainty around the new average.
template <class T>
RANKWISE_HOST_DEVICE inline void update_importance(T parameter, T gradient, const Decay<T>& decay,
                                                   T& sensitivity, T& uncertainty) {
  const T now = sensitivity_now(parameter, gradient);
  sensitivity = decay.beta1 * sensitivity + decay.one_minus_beta1 * now;
  uncertainty = decay.beta2 * uncertainty + decay.one_minus_beta2 * std::fabs(now - sensitivity);
}

// s(w), an element's part of its triplet's score. In double: the product of two small averages
// would underflow in float32.
template <class T>
RANKWISE_HOST_DEVICE inline double element_score(T sensitivity, T uncertainty) {
  return static_cast<double>(sensitivity) * static_cast<double>(uncertainty);
}

}  // namespace rankwise::kernels
