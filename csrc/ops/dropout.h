// Dropout of the adapter's input: probability, scale and seed. The mask is an op (dispatch.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace rankwise {

// p is quantised to a multiple of 2^-16; the scale fits the quantised value, so the mean is kept.
class Dropout {
 public:
  explicit Dropout(double p);

  bool active() const { return threshold_ > 0; }
  // An element is dropped when its 16-bit random number is below this; 65536 drops everything.
  uint32_t threshold() const { return threshold_; }
  // 1 / (1 - p) of the quantised p; 0 when everything is dropped.
  double keep_scale() const;
  // A fresh seed from PyTorch's generator of `like`'s device, int64 [1]; [0] when not active.
  // A tensor, so that CUDA graphs replay new masks and nothing waits for the device.
  at::Tensor draw_seed(const at::Tensor& like) const;

 private:
  uint32_t threshold_;
};

// The op `_dropout_mask` from ATen's integer ops: its definition, on any device.
at::Tensor dropout_mask_composite(const at::Tensor& seed, int64_t rows, int64_t cols,
                                  double dropout_p, at::ScalarType dtype);

}  // namespace rankwise
