// Dropout: seed, scale, and the mask from ATen's integer ops, which is the definition for devices
// without a kernel and for vmap (where seeds may be batched).
#include "dropout.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "../kernels/dropout_mask.h"
#include "checks.h"

namespace rankwise {

Dropout::Dropout(double p) : threshold_(static_cast<uint32_t>(std::nearbyint(p * 65536.0))) {}

double Dropout::keep_scale() const {
  return threshold_ < 65536u ? 65536.0 / (65536u - threshold_) : 0.0;
}

at::Tensor Dropout::draw_seed(const at::Tensor& like) const {
  const auto options = like.options().dtype(at::kLong);
  if (!active()) return at::empty({0}, options);
  return at::randint(std::numeric_limits<int64_t>::max(), {1}, options);
}

namespace {

constexpr int64_t low32 = 0xFFFFFFFFll;

struct Product {
  at::Tensor high, low;
};

at::Tensor shift_right(const at::Tensor& a, int64_t bits) {
  return at::bitwise_right_shift(a, at::Scalar(bits));
}

// The 64-bit product of 32-bit numbers held in int64: it wraps as unsigned would.
Product multiply(const at::Tensor& a, uint32_t b) {
  const at::Tensor product = a * static_cast<int64_t>(b);
  return {shift_right(product, 32) & low32, product & low32};
}

}  // namespace

at::Tensor dropout_mask_composite(const at::Tensor& seed, int64_t rows, int64_t cols,
                                  double dropout_p, at::ScalarType dtype) {
  using kernels::Philox;
  check_dropout_p("_dropout_mask", dropout_p);
  check_seed("_dropout_mask", seed, dropout_p);
  const int64_t count = rows * cols;
  const int64_t blocks = (count + kernels::elements_per_block - 1) / kernels::elements_per_block;
  const at::Tensor counter = at::arange(blocks, seed.options().dtype(at::kLong));
  at::Tensor c0 = counter & low32, c1 = shift_right(counter, 32);
  at::Tensor c2 = at::zeros_like(counter), c3 = c2;
  at::Tensor k0 = seed & low32, k1 = shift_right(seed, 32) & low32;
  for (int round = 0; round < Philox::rounds; ++round) {
    const Product p0 = multiply(c0, Philox::multiplier0), p1 = multiply(c2, Philox::multiplier1);
    c0 = p1.high ^ c1 ^ k0;
    c2 = p0.high ^ c3 ^ k1;
    c1 = p1.low;
    c3 = p0.low;
    k0 = (k0 + static_cast<int64_t>(Philox::weyl0)) & low32;
    k1 = (k1 + static_cast<int64_t>(Philox::weyl1)) & low32;
  }
  const at::Tensor words = at::stack({c0, c1, c2, c3}, -1);
  const at::Tensor numbers = at::stack({words & 0xFFFF, shift_right(words, 16)}, -1).reshape({-1});
  const int64_t threshold = Dropout(dropout_p).threshold();
  return numbers.narrow(0, 0, count).ge(threshold).to(dtype).reshape({rows, cols});
}

}  // namespace rankwise

TORCH_LIBRARY_IMPL(rankwise, CompositeExplicitAutograd, m) {
  m.impl("_dropout_mask", &rankwise::dropout_mask_composite);
}

TORCH_LIBRARY_IMPL(rankwise, FuncTorchBatchedDecomposition, m) {
  m.impl("_dropout_mask", &rankwise::dropout_mask_composite);
}
